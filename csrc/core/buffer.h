// SPDX-License-Identifier: MIT
// Scratch memory of one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace lmtfast {

// Uninitialised elements on a boundary of cache lines.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace lmtfast
