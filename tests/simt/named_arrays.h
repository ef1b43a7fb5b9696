// The arrays of a case by their names: what it was given, and what it has computed.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "case.h"
#include "common/simt.h"

namespace otface::test {

inline size_t bytes_of(char type) {
  switch (type) {
    case 'd':
    case 'l': return 8;
    case 'i':
    case 'f': return 4;
    case 'H': return 2;
    case 'B': return 1;
  }
  throw std::runtime_error("no such type of array");
}

class NamedArrays {
 public:
  // Sets the executor's order of threads, and what fills memory.
  explicit NamedArrays(const Arrays& arguments) : arguments_(arguments) {
    using simt::executor::Poison;
    using simt::executor::settings;
    settings.seed = static_cast<uint64_t>(integer("seed", 0));
    settings.trap_invalid = integer("trap_invalid", 0) != 0;
    settings.poison = integer("poison_float", 0) != 0 ? Poison::float_type : Poison::any_type;
  }

 protected:
  const Array* find(const std::string& name) const {
    for (const Arrays* arrays : {&results_, &arguments_}) {
      const auto entry = arrays->find(name);
      if (entry != arrays->end()) return &entry->second;
    }
    return nullptr;
  }
  const Array& needed(const std::string& name) const {
    const Array* array = find(name);
    if (array == nullptr) throw std::runtime_error("no array " + name);
    return *array;
  }
  const void* given(const std::string& name) const {
    const Array* array = find(name);
    return array == nullptr ? nullptr : array->data();
  }
  int64_t integer(const std::string& name, int64_t otherwise) const {
    const Array* array = find(name);
    return array == nullptr ? otherwise : *static_cast<const int64_t*>(array->data());
  }
  double number(const std::string& name, double otherwise) const {
    const Array* array = find(name);
    return array == nullptr ? otherwise : *static_cast<const double*>(array->data());
  }

  void* result(const std::string& name, char type, std::vector<int64_t> shape) {
    Array array(type, std::move(shape));
    simt::executor::poison(array.data(), array.bytes);
    return (results_[name] = std::move(array)).data();
  }
  static Array take_workspace(size_t bytes) {
    Array workspace('B', {static_cast<int64_t>(bytes)});
    simt::executor::poison(workspace.data(), workspace.bytes);
    return workspace;
  }
  static void check(const char* error) {
    if (*error != 0) throw std::runtime_error(error);
  }

  const Arrays& arguments_;
  Arrays results_;
};

}  // namespace otface::test
