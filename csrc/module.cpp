// The Python module rlad_kernels._C. It is empty: loading it registers the ops' CPU kernels with torch.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

#include "isa.h"

namespace {

std::string cpu_isa() { return rlad::current_isa().name; }

PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of rlad_kernels.", 0, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// No tensor argument, so no backend's key: this one also serves calls without any.
STABLE_TORCH_LIBRARY_IMPL(rlad, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module_def); }
