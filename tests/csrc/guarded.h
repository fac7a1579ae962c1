// SPDX-License-Identifier: MIT
// Output buffers that notice a write outside of them.
#pragma once

#include <limits>
#include <vector>

// A buffer with 16 sentinel values on either side of its content, which starts as NaN.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t size) : values_(size + 2 * kBand, kSentinel), size_(size) {
    for (size_t i = 0; i < size; ++i) (*this)[i] = kPoison;
  }
  T* data() { return values_.data() + kBand; }
  T& operator[](size_t i) { return values_[kBand + i]; }
  size_t size() const { return size_; }
  bool intact() const {
    for (size_t i = 0; i < kBand; ++i) {
      if (values_[i] != kSentinel || values_[kBand + size_ + i] != kSentinel) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBand = 16;
  static constexpr T kSentinel = T(-12345);
  // NaN, or for the bits of a bfloat16 the same.
  static constexpr T kPoison =
      std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : T(0x7FFF);
  std::vector<T> values_;
  size_t size_;
};
