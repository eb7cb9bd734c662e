// The Python modules `_cpu` and, compiled with FASTRLHF_CUDA, `_cuda`: every op that FASTRLHF_OP
// registered, under its own name, with the parameter names of its C declaration.
//
// A pointer is passed as an int (`Tensor.data_ptr()`) or None. The caller vouches for pointers,
// sizes and strides; the number and the kinds of the arguments are checked. The GIL is released.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "op.h"
#ifdef FASTRLHF_CUDA
#define FASTRLHF_MODULE _cuda
#else
#define FASTRLHF_MODULE _cpu
#include "dispatch.h"
#include "pool.h"
#endif

namespace py = pybind11;

namespace fastrlhf {

static Op* op_list = nullptr;

bool register_op(Op* op) {
  op->next = op_list;
  op_list = op;
  return true;
}

namespace {

constexpr std::size_t MAX_PARAMS = 64;

// "const void* x, int64_t n" -> {"x", "n"}
std::vector<std::string> parameter_names(const std::string& params) {
  std::vector<std::string> names;
  std::size_t begin = 0;
  while (begin < params.size()) {
    std::size_t end = params.find(',', begin);
    if (end == std::string::npos) end = params.size();
    const std::string piece = params.substr(begin, end - begin);
    const std::size_t last = piece.find_last_not_of(" \t\n");
    const std::size_t cut = piece.find_last_of(" \t\n*&", last);
    names.push_back(piece.substr(cut + 1, last - cut));
    begin = end + 1;
  }
  return names;
}

class Caller {
 public:
  explicit Caller(const Op* op) : op_(op) {
    for (const std::string& name : parameter_names(op->params)) {
      names_.push_back(name);
      keys_.push_back(PyUnicode_InternFromString(name.c_str()));
    }
  }

  void operator()(const py::args& args, const py::kwargs& kwargs) const {
    const std::size_t n = names_.size(), given = args.size();
    if (given + kwargs.size() != n) {
      throw py::type_error(std::string(op_->name) + " takes " + std::to_string(n) +
                           " arguments (" + op_->params + "), got " +
                           std::to_string(given + kwargs.size()));
    }
    Slot slots[MAX_PARAMS];
    for (std::size_t i = 0; i < n; ++i) {
      PyObject* value = i < given ? PyTuple_GET_ITEM(args.ptr(), static_cast<Py_ssize_t>(i))
                                  : PyDict_GetItemWithError(kwargs.ptr(), keys_[i]);
      if (value == nullptr) {
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        throw py::type_error(std::string(op_->name) + ": argument " + names_[i] + " is missing");
      }
      slots[i] = convert(value, i);
    }
#ifdef FASTRLHF_CUDA
    const Entry entry = op_->entry[0];
#else
    const Entry entry = op_->entry[active_isa()];
#endif
    const char* error = nullptr;
    {
      py::gil_scoped_release unlocked;
      error = op_->call(entry, slots);
    }
    if (error != nullptr) {
      const std::string message = std::string(op_->name) + ": " + error;
#ifdef FASTRLHF_CUDA
      throw std::runtime_error(message);
#else
      throw py::value_error(message);
#endif
    }
  }

 private:
  Slot convert(PyObject* value, std::size_t i) const {
    Slot slot;
    switch (op_->kinds[i]) {
      case 'f':
        slot.f = PyFloat_AsDouble(value);
        break;
      case 'p':
        slot.p = value == Py_None ? nullptr : PyLong_AsVoidPtr(value);
        break;
      default:
        slot.i = PyLong_AsLongLong(value);
    }
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::type_error(std::string(op_->name) + ": argument " + names_[i] + " must be " +
                           (op_->kinds[i] == 'f'   ? "a number"
                            : op_->kinds[i] == 'p' ? "an address (int) or None"
                                                   : "a 64-bit int") +
                           ", got " + std::string(py::repr(value)));
    }
    return slot;
  }

  const Op* op_;
  std::vector<std::string> names_;
  std::vector<PyObject*> keys_;  // interned, kept for the life of the process
};

}  // namespace
}  // namespace fastrlhf

PYBIND11_MODULE(FASTRLHF_MODULE, m) {
  using namespace fastrlhf;
  py::dict dtypes;
  dtypes["float32"] = static_cast<int>(F32);
  dtypes["float64"] = static_cast<int>(F64);
  dtypes["bfloat16"] = static_cast<int>(BF16);
  dtypes["float16"] = static_cast<int>(F16);
  m.attr("DTYPES") = dtypes;

  py::list names;
  for (const Op* op = op_list; op != nullptr; op = op->next) {
    if (std::char_traits<char>::length(op->kinds) > MAX_PARAMS) {
      throw py::import_error(std::string(op->name) + " has too many parameters");
    }
    const std::string doc = std::string(op->doc) + "\n\nParameters: " + op->params;
    m.attr(op->name) = py::cpp_function(Caller(op), py::name(op->name), py::scope(m), doc.c_str());
    names.append(op->name);
  }
  names.attr("sort")();
  m.attr("OPS") = py::tuple(names);

#ifndef FASTRLHF_CUDA
  m.def("isa", [] { return isa_name(active_isa()); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        py::list available;
        for (int isa = 0; isa < N_ISA; ++isa) {
          if (isa_available(isa)) available.append(isa_name(isa));
        }
        return py::tuple(available);
      },
      "The instruction sets that this build and this processor both have, narrowest first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (set_isa(name.c_str())) return;
        std::string message = "instruction set '" + name + "' is not available; this build has";
        for (int isa = 0; isa < N_ISA; ++isa) message += std::string(" ") + isa_name(isa);
        message += " and this processor runs";
        for (int isa = 0; isa < N_ISA; ++isa) {
          if (isa_available(isa)) message += std::string(" ") + isa_name(isa);
        }
        throw py::value_error(message);
      },
      py::arg("name"), "Selects an instruction set for every op from now on, in all threads.");
  m.def("borrow_threads", &borrow_threads, py::arg("wanted"),
        "Whether ops run on torch's OpenMP threads where there are any, or on their own.");
  m.def("borrows_threads", &borrows_threads, "Whether there are, and ops run on them.");
  m.def("pool_threads", &pool_threads, "Threads that the pool has started in this process.");
#endif
}
