// Tensors as kernels see them: an address and strides, in elements. Offsets are 64 bits wide.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace specexit {

template <typename T>
struct Vector {
  T* data;
  int64_t stride;

  __device__ T& operator[](int64_t index) const { return data[index * stride]; }
};

template <typename T>
struct Matrix {
  T* data;
  int64_t stride_row, stride_column;

  __device__ Vector<T> operator[](int64_t row) const { return {data + row * stride_row, stride_column}; }
};

template <typename T>
struct Cube {
  T* data;
  int64_t stride_slice, stride_row, stride_column;

  __device__ Matrix<T> operator[](int64_t slice) const {
    return {data + slice * stride_slice, stride_row, stride_column};
  }
};

}  // namespace specexit
