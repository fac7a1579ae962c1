// SPDX-License-Identifier: MIT
// Scratch memory of one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace lmtfast {

// Uninitialised elements that begin on a cache line. Rounded up here, because aligned allocation is
// several times slower for the small ones.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(::operator new(static_cast<size_t>(size) * sizeof(T) + kLine)),
        data_(
            reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kLine) / kLine * kLine)) {}
  ~Buffer() { ::operator delete(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr size_t kLine = 64;
  void* memory_;
  T* data_;
};

}  // namespace lmtfast
