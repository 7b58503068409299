// pydistill._testing: the kernels of every instruction set for NumPy, chosen by name and call, with
// no torch between. Arrays of 16-bit logits are float16, or uint16 holding bfloat16 bits. Never
// part of a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/cpuid.h"
#include "cpu/divergence.h"
#include "tests/math_table.h"

namespace py = pybind11;

namespace pd {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) {
    names.emplace_back(capability_name(static_cast<Capability>(i)));
  }
  return names;
}

int capability_of(const std::string& name) {
  const std::vector<std::string> names = capabilities();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<int>(i);
  }
  throw py::value_error("capability is '" + name + "'; use one of capabilities()");
}

Math math_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kMathNames); ++i) {
    if (name == kMathNames[i]) return static_cast<Math>(i);
  }
  throw py::value_error("function is '" + name + "'; use one of MATH");
}

DType dtype_of(const py::array& x) {
  if (x.dtype().is(py::dtype::of<float>())) return DType::kF32;
  if (x.dtype().is(py::dtype::of<uint16_t>())) return DType::kBf16;
  if (x.dtype().is(py::dtype("float16"))) return DType::kF16;
  throw py::type_error("dtype is neither float32, float16 nor uint16 (for bfloat16)");
}

Array<float> math(const std::string& capability, const std::string& function,
                  const Array<float>& x) {
  Array<float> out(x.size());
  math_map_table[capability_of(capability)](math_of(function), x.data(), x.size(),
                                            out.mutable_data());
  return out;
}

Array<float> load(const std::string& capability, const py::array& x) {
  if (!(x.flags() & py::array::c_style)) throw py::value_error("x is not contiguous; copy it");
  Array<float> out(x.size());
  widen_table[capability_of(capability)](dtype_of(x), x.data(), x.size(), out.mutable_data());
  return out;
}

Array<uint16_t> store(const std::string& capability, const std::string& dtype,
                      const Array<float>& x) {
  if (dtype != "bfloat16" && dtype != "float16") {
    throw py::value_error("dtype is '" + dtype + "'; use bfloat16 or float16");
  }
  Array<uint16_t> out(x.size());
  narrow_table[capability_of(capability)](dtype == "float16" ? DType::kF16 : DType::kBf16, x.data(),
                                          x.size(), out.mutable_data());
  return out;
}

Logits logits_of(const py::array& x) {
  if (x.ndim() != 2 || x.strides(1) != x.itemsize() || x.strides(0) < x.itemsize() * x.shape(1)) {
    throw py::value_error("logits are not rows of contiguous columns; copy them");
  }
  return {x.data(), dtype_of(x), x.shape(0), x.shape(1), x.strides(0) / x.itemsize()};
}

// A call in which pair i is row i of both arrays.
DivergenceArgs make_args(const py::array& student, const py::array& teacher, int kind,
                         float temperature, float alpha, float beta, bool scale_t2,
                         const std::optional<Array<int64_t>>& labels, float label_weight,
                         float z_loss) {
  DivergenceArgs a{};
  a.student = logits_of(student);
  a.teacher = logits_of(teacher);
  a.pairs = a.student.rows;
  if (a.teacher.rows != a.pairs || a.teacher.width != a.student.width || a.student.width < 1) {
    throw py::value_error("teacher has another shape than student, or no columns");
  }
  if (kind < 0 || kind > static_cast<int>(Kind::kTodi)) {
    throw py::value_error("kind is " + std::to_string(kind) + "; use 0 to 10");
  }
  if (labels && labels->size() != a.pairs) throw py::value_error("labels has another length");
  a.labels = labels ? labels->data() : nullptr;
  a.kind = static_cast<Kind>(kind);
  a.temperature = temperature;
  a.alpha = alpha;
  a.beta = beta;
  a.scale_t2 = scale_t2;
  a.label_weight = label_weight;
  a.z_loss = z_loss;
  a.vocab = a.student.width;
  return a;
}

void run(const DivergenceRows* table, const std::string& capability, const DivergenceArgs& a) {
  const auto bytes = static_cast<size_t>(divergence_scratch_bytes(a, true) + 63) / 64 * 64;
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes + 64),
                                                            &std::free);
  table[capability_of(capability)](a, 0, a.pairs, static_cast<float*>(scratch.get()));
}

const float* one_a_row(const char* name, const Array<float>& x, int64_t count) {
  if (x.size() != count) throw py::value_error(std::string(name) + " has another length");
  return x.data();
}

py::tuple divergence_forward(const std::string& capability, const py::array& student,
                             const py::array& teacher, int kind, float temperature, float alpha,
                             float beta, bool scale_t2, const std::optional<Array<int64_t>>& labels,
                             float label_weight, float z_loss) {
  DivergenceArgs a = make_args(student, teacher, kind, temperature, alpha, beta, scale_t2, labels,
                               label_weight, z_loss);
  Array<float> loss(a.pairs), saved({a.pairs, int64_t{kSaved}}), stats({a.pairs, int64_t{kStats}});
  a.loss = loss.mutable_data();
  a.saved = saved.mutable_data();
  a.stats = stats.mutable_data();
  run(divergence_forward_table, capability, a);
  return py::make_tuple(loss, saved, stats);
}

py::array divergence_backward(const std::string& capability, const py::array& student,
                              const py::array& teacher, Array<float> saved,
                              const Array<float>& grad_rows, int kind, float temperature,
                              float alpha, float beta, bool scale_t2,
                              const std::optional<Array<int64_t>>& labels, float label_weight,
                              float z_loss) {
  DivergenceArgs a = make_args(student, teacher, kind, temperature, alpha, beta, scale_t2, labels,
                               label_weight, z_loss);
  one_a_row("saved", saved, a.pairs * kSaved);
  a.saved = saved.mutable_data();
  a.grad_rows = one_a_row("grad_rows", grad_rows, a.pairs);
  py::array grad(student.dtype(), {a.pairs, a.vocab});
  a.grad = grad.mutable_data();
  a.grad_stride = a.vocab;
  run(divergence_backward_table, capability, a);
  return grad;
}

Array<float> divergence_overwrite(const std::string& capability, py::array student,
                                  const py::array& teacher, const Array<float>& grad_rows, int kind,
                                  float temperature, float alpha, float beta, bool scale_t2,
                                  const std::optional<Array<int64_t>>& labels, float label_weight,
                                  float z_loss) {
  student.mutable_data();  // throws if read-only
  DivergenceArgs a = make_args(student, teacher, kind, temperature, alpha, beta, scale_t2, labels,
                               label_weight, z_loss);
  Array<float> loss(a.pairs);
  a.loss = loss.mutable_data();
  a.grad_rows = one_a_row("grad_rows", grad_rows, a.pairs);
  run(divergence_overwrite_table, capability, a);
  return loss;
}

}  // namespace
}  // namespace pd

#define PD_SHAPE_ARGUMENTS                                                                        \
  py::kw_only(), py::arg("kind"), py::arg("temperature") = 1.0f, py::arg("alpha") = 0.5f,         \
                                  py::arg("beta") = 0.5f, py::arg("scale_t2") = false,            \
                                  py::arg("labels") = py::none(), py::arg("label_weight") = 0.0f, \
                                  py::arg("z_loss") = 0.0f

PYBIND11_MODULE(_testing, m) {
  py::tuple names(std::size(pd::kMathNames));
  for (size_t i = 0; i < std::size(pd::kMathNames); ++i) names[i] = pd::kMathNames[i];
  m.attr("MATH") = names;
  m.def("capabilities", &pd::capabilities);
  m.def("math", &pd::math, py::arg("capability"), py::arg("function"), py::arg("x"));
  m.def("load", &pd::load, py::arg("capability"), py::arg("x"));
  m.def("store", &pd::store, py::arg("capability"), py::arg("dtype"), py::arg("x"));
  m.def("divergence_forward", &pd::divergence_forward, py::arg("capability"), py::arg("student"),
        py::arg("teacher"), PD_SHAPE_ARGUMENTS);
  m.def("divergence_backward", &pd::divergence_backward, py::arg("capability"), py::arg("student"),
        py::arg("teacher"), py::arg("saved"), py::arg("grad_rows"), PD_SHAPE_ARGUMENTS);
  m.def("divergence_overwrite", &pd::divergence_overwrite, py::arg("capability"),
        py::arg("student"), py::arg("teacher"), py::arg("grad_rows"), PD_SHAPE_ARGUMENTS);
}
