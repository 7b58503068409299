// The Python module pydistill._C, and the only file that sees Python.h. It is empty: importing it
// loads the library, and the static initialisers of csrc/ops/*.cpp hand their kernels to torch.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
