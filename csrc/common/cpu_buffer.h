// Scratch memory of the CPU kernels. Part of the translation unit of one instruction set, like vec.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace otface {
namespace {

// Scratch memory that grows and is reused from problem to problem; aligned for any vector, contents unspecified.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }
  T* resize(int64_t count) {
    if (count > capacity_) {
      release();
      data_ = static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}));
      capacity_ = count;
    }
    return data_;
  }
  T* data() const { return data_; }
  operator T*() const { return data_; }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    capacity_ = 0;
  }
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace
}  // namespace otface
