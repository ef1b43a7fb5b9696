// Runs cases from a file, for the builds with a sanitizer: driver FILE [without FILE:LINE]
//
// Prints a checksum of each case's results and the barriers reached. The format of the file: write_cases in kernels.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "case.h"
#include "common/simt.h"

namespace {

using otface::test::Array;
using otface::test::Arrays;

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {}

  int64_t integer() {
    int64_t x = 0;
    bytes(&x, sizeof(x));
    return x;
  }
  void bytes(void* to, size_t count) {
    if (!file_.read(static_cast<char*>(to), static_cast<std::streamsize>(count))) throw std::runtime_error("no case");
  }
  Arrays arrays() {
    Arrays result;
    for (int64_t count = integer(); count > 0; --count) {
      std::string name(static_cast<size_t>(integer()), ' ');
      bytes(name.data(), name.size());
      const char type = static_cast<char>(integer());
      std::vector<int64_t> shape(static_cast<size_t>(integer()));
      for (int64_t& size : shape) size = integer();
      Array array(type, std::move(shape));
      bytes(array.data(), array.bytes);
      result[name] = std::move(array);
    }
    return result;
  }

 private:
  std::ifstream file_;
};

// FNV-1a over all bits, every NaN taken as the same one.
class Checksum {
 public:
  void add(const Array& array) {
    if (array.type == 'd') return add_items<double>(array);
    if (array.type == 'f') return add_items<float>(array);
    add_bytes(array.data(), array.bytes);
  }
  unsigned long long value() const { return state_; }

 private:
  template <class T>
  void add_items(const Array& array) {
    const T* x = static_cast<const T*>(array.data());
    for (size_t k = 0; k < array.bytes / sizeof(T); ++k) {
      const T item = std::isnan(x[k]) ? static_cast<T>(NAN) : x[k];
      add_bytes(&item, sizeof(T));
    }
  }
  void add_bytes(const void* p, size_t bytes) {
    for (size_t k = 0; k < bytes; ++k) state_ = (state_ ^ static_cast<const unsigned char*>(p)[k]) * 0x100000001b3u;
  }

  unsigned long long state_ = 0xcbf29ce484222325u;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && !(argc == 4 && std::strcmp(argv[2], "without") == 0)) return 2;
  if (argc == 4) otface::simt::executor::settings.without_barrier = argv[3];
  try {
    Reader reader(argv[1]);
    for (int64_t count = reader.integer(); count > 0; --count) {
      Checksum sum;
      for (const auto& [name, array] : otface::test::run_case(reader.arrays())) sum.add(array);
      std::printf("results %016llx\n", sum.value());
      std::fflush(stdout);
    }
    for (const std::string& name : otface::simt::executor::barriers()) std::printf("barrier %s\n", name.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
