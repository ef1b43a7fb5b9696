// Calls the launchers of csrc/*/launch_cuda.h with arrays that have a name, for the module and for the driver.
//
// Every array is a heap block of exactly its size, so that the address sanitizer sees an overrun, and what a kernel has
// to write is filled with NaN before.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace otface::test {

struct Array {
  char type = 0;  // 'd' double, 'f' float, 'l' int64_t, 'i' int32_t, 'H' uint16_t (a half type), 'B' uint8_t
  std::vector<int64_t> shape;
  size_t bytes = 0;

  Array() = default;
  Array(char type, std::vector<int64_t> shape);  // not initialised

  void* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

using Arrays = std::map<std::string, Array>;

// What is in `arguments`: see kernels.py; where it holds a "margin_step", margin.py; a "near_step", near.py. Throws
// std::runtime_error with the launcher's words.
Arrays run_case(const Arrays& arguments);
Arrays run_margin_case(const Arrays& arguments);  // margin_case.cpp
Arrays run_near_case(const Arrays& arguments);    // near_case.cpp

}  // namespace otface::test
