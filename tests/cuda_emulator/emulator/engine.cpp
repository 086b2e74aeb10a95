#include "engine.hpp"

namespace cuda_emulator {

void Engine::fail(const std::string& message) {
  auto coordinates = [](uint3 i) {
    return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z);
  };
  error_ = message + " [block " + coordinates(blockIdx) + " thread " + coordinates(current().index) + "]";
  for (;;) yield();
}

// ---- switching ----

// Leaves the running thread for the scheduler.
EMULATOR_RAW void Engine::yield([[maybe_unused]] bool last) {
  const int me = current_;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(tsan_main_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &lanes_[me].asan, main_bottom_, main_size_);
#endif
  switch_context(lanes_[me].context, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(lanes_[me].asan, &main_bottom_, &main_size_);
#endif
}

EMULATOR_RAW void Engine::resume(int thread) {
  current_ = thread;
  threadIdx = lanes_[thread].index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake_, stacks_[pool_] + thread * kStackBytes, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(lanes_[thread].tsan[pool_], __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(scheduler_, lanes_[thread].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake_, nullptr, nullptr);
#endif
}

EMULATOR_RAW void Engine::entry() {
  Engine& e = get();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &e.main_bottom_, &e.main_size_);
#endif
  sanitizer_acquire(&e.start_sync_);
  sanitizer_acquire(
      &e.block_sync_[(e.block_ + 2) % 4]);  // the block before the last, whose stacks and memory this one takes
  e.body_(e.argument_);
  sanitizer_release(&e.block_sync_[e.block_ % 4]);
  sanitizer_release(&e.done_sync_);
  e.finish();
}

EMULATOR_RAW void Engine::finish() {
  if (current().first != current().last) fail("a thread exits with asynchronous copies never waited for");
  current().wait = Wait::Done;
  warps_[current_ / 32].exited |= 1u << current_ % 32;
  ++exited_;
  release_block();
  yield(true);
  std::abort();
}

EMULATOR_RAW void Engine::make_ready(int thread) {
  Warp& w = warps_[thread / 32];
  w.ready |= 1u << thread % 32;
  runnable_ |= 1u << w.rank;
}

// ---- barriers and warp operations ----

EMULATOR_RAW void Engine::release_block() {
  if (arrived_ == 0 || arrived_ + exited_ < count_) return;
  for (int i = 0; i < count_; ++i)
    if (lanes_[i].wait == Wait::AtBlock) {
      lanes_[i].wait = Wait::Ready;
      make_ready(i);
    }
  arrived_ = 0;
  ++barrier_phase_;
}

EMULATOR_RAW void Engine::block_barrier(unsigned line) {
  if (arrived_ && barrier_line_ != line)
    fail("__syncthreads() reached at line " + std::to_string(line) + " and at line " + std::to_string(barrier_line_));
  if (exited_) fail("__syncthreads() at line " + std::to_string(line) + " after threads of the block have returned");
  barrier_line_ = line;
  char* sync = &barrier_sync_[pool_][barrier_phase_ & 1];
  sanitizer_release(sync);
  current().wait = Wait::AtBlock;
  ++arrived_;
  release_block();
  yield();
  sanitizer_acquire(sync);
}

// Every lane of `mask` leaves `bytes` for the others; returns the warp's slots.
EMULATOR_RAW unsigned char (*Engine::exchange(unsigned mask, const void* data, size_t bytes, const char* operation,
                                              unsigned line)) [kSlotBytes] {
  const int me = current_, lane = me % 32, first = me - lane;
  Lane& l = lanes_[me];
  Warp& w = warps_[me / 32];
  if (!(mask >> lane & 1)) fail(std::string(operation) + ": the calling lane is not in its mask");
  if (mask & w.exited) fail(std::string(operation) + ": the mask names a lane that has returned");
  const unsigned parity = l.phase++ & 1;
  // Volatile: a call of memcpy would be the sanitizers'.
  size_t i = 0;
  for (; i + 4 <= bytes; i += 4)
    *reinterpret_cast<volatile uint32_t*>(w.slot[parity][lane] + i) =
        *reinterpret_cast<const uint32_t*>(static_cast<const unsigned char*>(data) + i);
  for (; i < bytes; ++i)
    static_cast<volatile unsigned char&>(w.slot[parity][lane][i]) = static_cast<const unsigned char*>(data)[i];
  sanitizer_release(&w.sync[pool_]);
  l.wait = Wait::AtWarp, l.mask = mask, l.operation = operation, l.line = line;
  w.waiting |= 1u << lane;
  if ((w.waiting & mask) == mask) {
    for (int j = 0; j < 32; ++j) {
      if (!(mask >> j & 1)) continue;
      Lane& other = lanes_[first + j];
      if (other.mask != mask || other.line != line || std::strcmp(other.operation, operation))
        fail("lanes of one warp meet at " + std::string(operation) + " line " + std::to_string(line) + " and " +
             other.operation + " line " + std::to_string(other.line));
      other.wait = Wait::Ready;
      make_ready(first + j);
    }
    w.waiting &= ~mask;
  }
  yield();
  sanitizer_acquire(&w.sync[pool_]);
  return w.slot[parity];
}

// ---- shared memory: as undefined as on the device, so NaN in every format ----

static EMULATOR_RAW void poison(unsigned char* p, size_t n) {
  for (volatile unsigned char* q = p; n; --n) *q++ = 0xff;
}

EMULATOR_RAW unsigned char* Engine::shared_memory(const void* key, size_t bytes) {
  SharedBlock* all = shared_[pool_];
  size_t used = 0;
  for (int i = 0; i < shareds_[pool_]; ++i) {
    if (all[i].key == key) return all[i].base;
    used += (all[i].bytes + 127) / 128 * 128;
  }
  if (used + bytes > kSharedBytes || shareds_[pool_] == kMaxShared) fail("more static shared memory than 48 KiB");
#if defined(__SANITIZE_ADDRESS__)
  void* memory = nullptr;  // of the exact size, for the red zone
  if (posix_memalign(&memory, 128, bytes)) fail("out of memory");
  auto* p = static_cast<unsigned char*>(memory);
#else
  auto* p = stacks_[pool_] + kMaxThreads * kStackBytes + used;
#endif
  poison(p, bytes);
  all[shareds_[pool_]++] = {key, p, bytes};
  return p;
}

void Engine::free_shared() {
  for (int p = 0; p < 2; ++p) {
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < shareds_[p]; ++i) std::free(shared_[p][i].base);
#endif
    shareds_[p] = 0;
  }
}

// ---- running ----

EMULATOR_RAW void Engine::order_warps(int warps) {
  for (int i = 0; i < warps; ++i) order_[i] = options.order == Order::Reverse ? warps - 1 - i : i;
  if (options.order == Order::Random)
    for (int i = warps; i > 1; --i) std::swap(order_[i - 1], order_[next_random() % i]);
  for (int i = 0; i < warps; ++i) {
    Warp& w = warps_[order_[i]];
    w.rank = i;
    w.ready = w.waiting = 0;
    const int lanes = count_ - order_[i] * 32;
    w.exited = lanes < 32 ? ~0u << lanes : 0;
  }
}

EMULATOR_RAW void Engine::start_threads() {
  for (int i = 0; i < count_; ++i) {
    Lane& l = lanes_[i];
    make_context(l.context, stacks_[pool_] + i * kStackBytes, kStackBytes, entry);
    l.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    l.wait = Wait::Ready;
    l.phase = l.committed = l.first = l.last = 0;
#if defined(__SANITIZE_THREAD__)
    if (!l.tsan[pool_]) l.tsan[pool_] = __tsan_create_fiber(0);
#endif
    make_ready(i);
  }
  sanitizer_release(&start_sync_);
}

EMULATOR_RAW void Engine::run_block(int threads) {
  pool_ = ++block_ & 1;
  count_ = threads;
  if (!stacks_[pool_]) {
    void* p = mmap(nullptr, kMaxThreads * kStackBytes + kSharedBytes + 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the fibers");
    stacks_[pool_] = static_cast<unsigned char*>(p);
  }
  for (int i = 0; i < shareds_[pool_]; ++i) poison(shared_[pool_][i].base, shared_[pool_][i].bytes);
  arrived_ = exited_ = 0;
  runnable_ = 0;
  order_warps((threads + 31) / 32);
  start_threads();
  // The first warp in order that can go on does, so that warps run as far apart as barriers let them.
  while (runnable_ && error_.empty()) {
    const int rank = __builtin_ctz(runnable_);
    Warp& w = warps_[order_[rank]];
    const int lane = options.order == Order::Forward ? __builtin_ctz(w.ready) : 31 - __builtin_clz(w.ready);
    w.ready &= ~(1u << lane);
    if (!w.ready) runnable_ &= ~(1u << rank);
    resume(order_[rank] * 32 + lane);
  }
  if (error_.empty() && exited_ < threads) explain_deadlock();
}

void Engine::explain_deadlock() {
  for (int i = 0; i < count_; ++i) {
    const Lane& l = lanes_[i];
    if (l.wait == Wait::Done) continue;
    error_ = "deadlock: thread " + std::to_string(i) + " waits at " +
             (l.wait == Wait::AtBlock ? "__syncthreads() line " + std::to_string(barrier_line_)
                                      : std::string(l.operation) + " line " + std::to_string(l.line)) +
             " for threads that never come";
    return;
  }
}

EMULATOR_RAW void Engine::run_grid(dim3 grid, dim3 block, void (*body)(void*), void* argument) {
  body_ = body, argument_ = argument;
  gridDim = grid, blockDim = block;
  random_ = options.seed * 0x9E3779B97F4A7C15ull + 1;
  error_.clear();
  const int64_t threads = int64_t(block.x) * block.y * block.z, blocks = int64_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("invalid launch configuration");
#if defined(__SANITIZE_THREAD__)
  tsan_main_ = __tsan_get_current_fiber();
#endif
  for (int64_t k = 0; k < blocks && error_.empty(); ++k) {
    const int64_t b = options.order == Order::Reverse ? blocks - 1 - k : k;
    if (b < options.first_block || b >= options.last_block) continue;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (int64_t(grid.x) * grid.y))};
    run_block(static_cast<int>(threads));
  }
  sanitizer_acquire(&done_sync_);
  free_shared();
  if (!error_.empty()) throw std::runtime_error(error_);
}
}  // namespace cuda_emulator
