// otface_simt: the kernels for numpy, on the host executor.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "case.h"
#include "common/simt.h"

namespace py = pybind11;
using otface::test::Array;
using otface::test::Arrays;

namespace {

Array from_numpy(const py::array& x) {
  Array array(x.dtype().char_(), {x.shape(), x.shape() + x.ndim()});
  if ((x.flags() & py::array::c_style) == 0) throw std::runtime_error("an array that is not contiguous");
  std::memcpy(array.data(), x.data(), array.bytes);
  return array;
}

py::array to_numpy(const Array& array) {
  return py::array(py::dtype(std::string(1, array.type)), array.shape, array.data());
}

py::dict run(const py::dict& arguments) {
  Arrays arrays;
  for (const auto& [name, value] : arguments)
    arrays[py::cast<std::string>(name)] = from_numpy(py::cast<py::array>(value));
  py::dict results;
  for (const auto& [name, array] : otface::test::run_case(arrays)) results[py::str(name)] = to_numpy(array);
  return results;
}

}  // namespace

PYBIND11_MODULE(otface_simt, module) {
  module.def("run", run, "Runs a case: a dictionary of contiguous arrays, see kernels.py. Returns all results.");
  module.def("barriers", otface::simt::executor::barriers, "The barriers reached so far, as FILE:LINE.");
}
