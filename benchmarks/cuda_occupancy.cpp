// Lines "architecture registers shared-bytes threads" to lines "resident blocks, share of warps", by NVIDIA's
// calculator.
#include <cuda_occupancy.h>

#include <cstdio>

struct Multiprocessor {
  int architecture, threads, shared;
};

int main() {
  const Multiprocessor known[] = {{80, 2048, 167936}, {86, 1536, 102400},  {89, 1536, 102400},
                                  {90, 2048, 233472}, {100, 2048, 233472}, {120, 1536, 102400}};
  int architecture, registers, shared, threads;
  while (std::scanf("%d %d %d %d", &architecture, &registers, &shared, &threads) == 4) {
    const Multiprocessor* m = nullptr;
    for (const auto& k : known)
      if (k.architecture == architecture) m = &k;
    if (!m) return 1;
    cudaOccDeviceProp device{};
    device.computeMajor = architecture / 10, device.computeMinor = architecture % 10;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = m->threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
    device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = m->shared;
    device.sharedMemPerBlockOptin = m->shared - 1024, device.reservedSharedMemPerBlock = 1024, device.numSms = 1;
    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state{};
    state.cacheConfig = CACHE_PREFER_NONE, state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0)) return 2;
    const int blocks = result.activeBlocksPerMultiprocessor;
    std::printf("%d %.4f\n", blocks, static_cast<double>(blocks) * threads / m->threads);
  }
}
