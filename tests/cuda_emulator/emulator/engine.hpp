// The scheduler: one fiber per CUDA thread, one warp after another as far as barriers let it, blocks one after another.
// It reports what hardware would leave undefined: threads that meet at different barriers or warp operations, masks
// that name absent lanes, deadlocks, misaligned asynchronous copies, copies never waited for, invalid launches.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>

#include "device_types.hpp"
#include "fiber.hpp"
#include "sanitizers.hpp"

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

namespace cuda_emulator {

enum class Order { Forward, Reverse, Random };

// How to run. Blocks outside [first_block, last_block) are left out: for tests of indices past 2^31.
struct Options {
  Order order = Order::Forward;
  uint64_t seed = 1;
  bool lazy_copies = true;       // an asynchronous copy lands when it is waited for; else at once
  int64_t max_blocks = 1 << 20;  // what grid_blocks() caps a grid at, so that few blocks exercise grid-stride loops
  int64_t max_workspace_bytes = 256 << 20;
  int64_t first_block = 0, last_block = INT64_MAX;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

constexpr int kSlotBytes = 128;  // what a lane gives to its warp at once
constexpr int kMaxThreads = 1024, kMaxCopies = 256, kMaxShared = 16;
constexpr size_t kSharedBytes = 48 * 1024;       // what a kernel may declare statically on any architecture
constexpr size_t kStackBytes = 64 * 1024 + 192;  // an odd stride: equal ones would share cache sets

enum class Wait : uint8_t { Ready, AtBlock, AtWarp, Done };
struct Lane {
  Context context{};
  uint3 index{};
  Wait wait = Wait::Ready;
  unsigned phase = 0;           // parity of the warp exchange buffer
  unsigned mask = 0, line = 0;  // of the warp operation waited for
  const char* operation = "";
  unsigned committed = 0, first = 0, last = 0;  // groups of copies; those in flight are [first, last)
  Copy copies[kMaxCopies];
  void* tsan[2] = {};
  void* asan = nullptr;
};
struct Warp {
  alignas(16) unsigned char slot[2][32][kSlotBytes];
  unsigned waiting, exited, ready;  // masks of lanes
  int rank;                         // in the order of scheduling
  char sync[2];                     // what ThreadSanitizer orders lanes by, by parity of the block
};
struct SharedBlock {
  const void* key;
  unsigned char* base;
  size_t bytes;
};

class Engine {
 public:
  Options options;

  static Engine& get() {
    static Engine engine;
    return engine;
  }
  void run_grid(dim3 grid, dim3 block, void (*body)(void*), void* argument);

  // Called by the running thread.
  [[noreturn]] void fail(const std::string& message);
  void block_barrier(unsigned line);
  unsigned char (*exchange(unsigned mask, const void* data, size_t bytes, const char* operation,
                           unsigned line))[kSlotBytes];
  unsigned char* shared_memory(const void* key, size_t bytes);
  Lane& current() { return lanes_[current_]; }
  int lane() const { return current_ % 32; }

 private:
  Lane* lanes_ = new Lane[kMaxThreads];
  Warp* warps_ = new Warp[kMaxThreads / 32];
  SharedBlock shared_[2][kMaxShared];  // by parity of the block, as are the stacks: a block's memory is another's only
  int shareds_[2] = {};                // after the one in between has ended
  unsigned char* stacks_[2] = {};
  int order_[kMaxThreads / 32];
  int count_ = 0, pool_ = 0, current_ = -1, arrived_ = 0, exited_ = 0;
  unsigned runnable_ = 0;  // ranks of the warps with a ready lane
  unsigned barrier_line_ = 0, barrier_phase_ = 0, block_ = 0;
  Context scheduler_{};
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::string error_;
  char start_sync_ = 0, done_sync_ = 0, barrier_sync_[2][2] = {}, block_sync_[4] = {};
  uint64_t random_ = 1;
#if defined(__SANITIZE_THREAD__)
  void* tsan_main_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* main_fake_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
#endif

  uint64_t next_random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_;
  }
  static void entry();
  void finish();
  void yield(bool last = false);
  void resume(int thread);
  void make_ready(int thread);
  void release_block();
  void order_warps(int warps);
  void start_threads();
  void run_block(int threads);
  void explain_deadlock();
  void free_shared();
};

template <class T>
inline char shared_key;
}  // namespace cuda_emulator
