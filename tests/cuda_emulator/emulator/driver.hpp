// A case of the driver: an operator's name, the format of its numbers, integers (sizes and strides), and buffers. Each
// cases/<op>.cpp adds the function that turns a case into a call of launch_<op>().
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulator.hpp"

namespace torch_curvature::cuda {
struct Tf32;
}

namespace cuda_emulator {

struct Buffer {
  int64_t bytes = 0;
  unsigned char* data = nullptr;
};

struct Case {
  std::string format;
  std::vector<int64_t> integers;
  std::vector<Buffer> buffers;

  template <class T>
  T* buffer(size_t i) const {
    return reinterpret_cast<T*>(buffers.at(i).data);
  }
  int64_t operator[](size_t i) const { return integers.at(i); }
};

using Function = std::function<void(const Case&)>;
inline std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> all;
  return all;
}
struct Register {
  Register(const char* name, Function f) { functions()[name] = std::move(f); }
};

// Calls f with a null pointer of the case's element type.
template <class F>
void dispatch(const Case& c, F f) {
#ifdef EMULATOR_ONLY_TYPE  // one instantiation, compiled in a quarter of the time
  (void)c;
  f(static_cast<EMULATOR_ONLY_TYPE*>(nullptr));
#else
  if (c.format == "float32") f(static_cast<float*>(nullptr));
  else if (c.format == "float64") f(static_cast<double*>(nullptr));
  else if (c.format == "bfloat16") f(static_cast<__nv_bfloat16*>(nullptr));
  else if (c.format == "float16") f(static_cast<__half*>(nullptr));
  else throw std::runtime_error("unknown format " + c.format);
#endif
}
// For operators that multiply matrices: also float32 multiplied in TF32.
template <class F>
void dispatch_products(const Case& c, F f) {
#ifndef EMULATOR_ONLY_TYPE
  if (c.format == "tf32") return f(static_cast<torch_curvature::cuda::Tf32*>(nullptr));
#endif
  dispatch(c, f);
}
}  // namespace cuda_emulator
