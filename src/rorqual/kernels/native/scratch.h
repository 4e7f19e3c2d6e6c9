// Memory that a thread keeps from call to call, so that a step of decoding allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

class Scratch {
  public:
    ~Scratch() { std::free(data_); }

    // At least `count` values; what was there is lost.
    template <class T>
    T* take(int64_t count) {
        const size_t bytes = ((size_t)count * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            size_ = data_ ? bytes : 0;
        }
        return (T*)data_;
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t up_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace
