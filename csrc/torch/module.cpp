// The Python module `otface_cuda._C`. It is empty: importing it loads the library, and loading the library registers
// torch.ops.otface.*
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
  };
  return PyModule_Create(&definition);
}
