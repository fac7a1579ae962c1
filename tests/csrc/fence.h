// SPDX-License-Identifier: MIT
// A buffer whose end, or whose start, lies at a page that must not be touched: a kernel that reads or
// writes beyond it ends the test at once. Starts as 0xFF bytes: NaN, and no index of anything.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

template <class T>
class Fenced {
 public:
  Fenced(size_t size, bool at_end) : size_(size) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    // Panels are read 16 bytes at a time, so that is how buffers are aligned.
    const size_t bytes = (size * sizeof(T) + 15) / 16 * 16;
    const size_t inner = (bytes + page - 1) / page * page;
    whole_ = inner + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED ||
        (inner != 0 && mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0)) {
      std::abort();
    }
    if (inner != 0) std::memset(base_ + page, 0xFF, inner);
    data_ = reinterpret_cast<T*>(base_ + page + (at_end ? inner - bytes : 0));
    // What rounding to 16 bytes has added behind the end.
    tail_ = bytes - size * sizeof(T);
  }
  Fenced(const std::vector<T>& values, bool at_end) : Fenced(values.size(), at_end) {
    if (size_ != 0) std::memcpy(data_, values.data(), size_ * sizeof(T));
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(base_, whole_); }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + size_); }
  bool tail_intact() const {
    const auto* tail = reinterpret_cast<const unsigned char*>(data_ + size_);
    for (size_t i = 0; i < tail_; ++i) {
      if (tail[i] != 0xFF) return false;
    }
    return true;
  }

 private:
  size_t size_, whole_ = 0, tail_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};
