// What every .cu entry needs around its launch: the device set and restored, the error as text.
#pragma once

#include <cuda_runtime.h>

namespace fastrlhf::cuda {
namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error(cudaGetDevice(&before_)) {
    if (error == cudaSuccess && device != before_) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;

 public:
  cudaError_t error;
};

// nullptr, or why the launch just made was refused.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fastrlhf::cuda
