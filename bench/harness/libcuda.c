// A libcuda that loads and launches nothing, and holds every call to the rules of the hardware and of the driver's documentation.
// Device N is a GPU of compute capability N: 90 is an sm_90. A call that breaks a rule fails with a message that begins with "stub:".
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char message[256] = "stub: error";
static int capability = 90; // of the device in use
void stub_use(int device) { capability = device; }

static CUresult refuse(const char *rule, long long value, long long limit) {
  snprintf(message, sizeof message, "stub: %s (%lld, %lld)", rule, value, limit);
  return CUDA_ERROR_INVALID_VALUE;
}

static int shared_limit(int device) { // bytes a block may have, opted in
  switch (device) {
  case 80: return 163 * 1024;
  case 86: case 89: case 120: return 99 * 1024;
  default: return 227 * 1024;
  }
}

CUresult cuGetErrorString(CUresult error, const char **text) { *text = message; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(device); break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit(device) + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1000;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)16; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)32; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 128; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > shared_limit(capability))
    return refuse("dynamic shared memory of a function", value, shared_limit(capability));
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) { *count = 1; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr pointer) { return CUDA_SUCCESS; }

static unsigned long long tensor_maps = 0, launches = 0;
unsigned long long stub_tensor_maps(void) { return tensor_maps; }
unsigned long long stub_launches(void) { return launches; }

// The CUDA driver API's reference, section "Tensor Map Object Management".
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sides,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  static const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  tensor_maps++;
  if ((int)type < 0 || (int)type > 12) return refuse("tensor map: type", type, 12);
  if (rank < 1 || rank > 5) return refuse("tensor map: rank", rank, 5);
  if ((uintptr_t)address % 16) return refuse("tensor map: address not a multiple of 16", (long long)((uintptr_t)address % 16), 0);
  for (unsigned i = 0; i < rank; i++) {
    if (sides[i] == 0 || sides[i] > (1ull << 32)) return refuse("tensor map: side", i, (long long)sides[i]);
    if (box[i] == 0 || box[i] > 256) return refuse("tensor map: side of the box over 256", i, box[i]);
    if (element_strides[i] < 1 || element_strides[i] > 8) return refuse("tensor map: element stride", i, element_strides[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (strides[i] % 16 || strides[i] >= (1ull << 40) || strides[i] == 0)
      return refuse("tensor map: stride in bytes not a multiple of 16", i, (long long)strides[i]);
  long long inner = (long long)box[0] * sizes[type];
  if (inner % 16) return refuse("tensor map: rows of the box not a multiple of 16 bytes", inner, 16);
  long long span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                   : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : inner;
  if (inner > span) return refuse("tensor map: rows of the box wider than the swizzle", inner, span);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sides,
                                 const cuuint64_t *strides, const int *lower, const int *upper, cuuint32_t channels, cuuint32_t pixels,
                                 const cuuint32_t *element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return refuse("tensor map: im2col is not checked here", 0, 0);
}

// The CUDA programming guide's table of technical specifications by compute capability.
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  launches++;
  if (config->gridDimX < 1 || config->gridDimX > 2147483647u) return refuse("grid x", config->gridDimX, 2147483647);
  if (config->gridDimY < 1 || config->gridDimY > 65535) return refuse("grid y over 65535", config->gridDimY, 65535);
  if (config->gridDimZ < 1 || config->gridDimZ > 65535) return refuse("grid z over 65535", config->gridDimZ, 65535);
  if (config->blockDimX < 1 || config->blockDimX > 1024) return refuse("threads of a block", config->blockDimX, 1024);
  if (config->sharedMemBytes > (unsigned)shared_limit(capability))
    return refuse("shared memory of a launch", config->sharedMemBytes, shared_limit(capability));
  return CUDA_SUCCESS;
}
