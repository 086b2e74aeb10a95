// What every CPU kernel's registration needs: results, dtype dispatch, and work shared among torch's own threads.
#pragma once
#include "../strided.h"
#include "memory.h"
#include "simd.h"

#include <atomic>
#include <new>

namespace torch_curvature::cpu {

// A fresh, uninitialised result. Refused by its size before anything is allocated; large ones ask for huge pages.
inline Tensor new_result(const char* op, const Tensor& like, const Sizes& sizes) {
  int64_t bytes = 1;
  for (int64_t s : sizes)
    CURVATURE_CHECK(!__builtin_mul_overflow(bytes, s, &bytes), op, ": the result ", shape_text(sizes),
                    " has more elements than 64 bits count.");
  check_fits(op, shape_text(sizes), static_cast<double>(bytes) * like.element_size());
  bytes *= like.element_size();
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle =
      nullptr;  // the C call itself: a trip through the dispatcher costs as much as a tiny operator
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  Tensor out(handle);
  advise_huge_pages(out.data_ptr(), bytes);
  return out;
}

// Calls f with a null pointer of the C++ type that holds `dtype`.
template <class F>
void dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); break;
    case ScalarType::Double: f(static_cast<double*>(nullptr)); break;
    case ScalarType::Half: f(static_cast<c10::Half*>(nullptr)); break;
    case ScalarType::BFloat16: f(static_cast<c10::BFloat16*>(nullptr)); break;
    default: CURVATURE_CHECK(false, "unsupported dtype");
  }
}

// Splits [0, count) among torch's threads; `cost` is the work of one item in elements touched.
template <class F>
void parallel_over(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kGrain = 32768;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)), f);
}

// Runs f(task) for tasks of unequal or unknown cost: each thread takes the next one when it is free. Who computes what
// must not matter to the result. Tasks that are tiny in all are not worth a thread.
template <class F>
void share_tasks(int64_t count, bool worth_threads, const F& f) {
  if (!worth_threads || count <= 1) {
    for (int64_t task = 0; task < count; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(task);
  });
}

// The same where each thread keeps memory of its own, and knows its next task (`count` after the last), so that it can
// ask for what that reads: thread(each) is called once for each of them, and each(f) runs f(task, following).
template <class Thread>
void share_tasks_ahead(int64_t count, bool worth_threads, const Thread& thread) {
  std::atomic<int64_t> next{0};
  auto claim = [&] { return std::min(count, next.fetch_add(1, std::memory_order_relaxed)); };
  auto each = [&](const auto& f) {
    for (int64_t task = claim(), following; task < count; task = following) f(task, following = claim());
  };
  const int64_t threads = worth_threads ? std::min<int64_t>(count, torch::stable::get_num_threads()) : 1;
  if (threads <= 1) return thread(each);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { thread(each); });
}

constexpr double kWorthThreads = 1e5;  // multiply-adds below which one thread is faster

// Uninitialised scratch memory, aligned to cache lines; large pieces ask for huge pages.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<A*>(::operator new(bytes(count), std::align_val_t(64)))) {
    advise_huge_pages(data_, bytes(count));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  operator A*() const { return data_; }

 private:
  static size_t bytes(int64_t count) { return std::max<int64_t>(64, count * sizeof(A)); }
  A* data_;
};
}  // namespace torch_curvature::cpu
