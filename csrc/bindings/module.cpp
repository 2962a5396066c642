#include <omp.h>

#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "core/check.h"
#include "cpu/blas.h"
#include "cpu/make_cpu_ops.h"
#include "cuda/make_cuda_ops.h"

namespace llmc::bindings {

void register_build_info(py::module_& module) {
  using namespace py::literals;
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["cpu"] = make_cpu_ops()->name();
        info["cpu_isas"] = available_isas();
        info["blas"] = blas::name();
        info["compiler"] = __VERSION__;
        info["cuda"] = has_cuda();
        info["cudnn"] = has_cudnn();
        info["cublaslt"] = cublas_lt_version();
        info["threads"] = omp_get_max_threads();
        return info;
      },
      "What this build of the core is made of.");
  module.def("why_no_cuda_device", &bindings::why_no_cuda_device, "Why no model can run on CUDA, or an empty string.");
  module.def("cuda_free_memory", &cuda_free_memory, "device"_a = 0,
             "Bytes of a CUDA device's memory that are free now.");
  module.def(
      "cuda_devices",
      [] {
        py::list devices;
        for (int i = 0; i < cuda_device_count(); i++) {
          const CudaDevice device = cuda_device(i);
          py::dict entry;
          entry["name"] = device.name;
          entry["pci_bus_id"] = device.pci_bus_id;
          entry["compute_capability"] = py::make_tuple(device.compute_capability / 10, device.compute_capability % 10);
          entry["multiprocessors"] = device.multiprocessors;
          entry["memory"] = device.memory;
          entry["shared_memory_per_block"] = device.shared_memory_per_block;
          devices.append(entry);
        }
        return devices;
      },
      "The CUDA devices that can be used: name, PCI bus id, compute capability, multiprocessors, memory in bytes.");
  module.def(
      "peak_flops", [] { return make_cpu_ops()->peak_flops(); }, py::call_guard<py::gil_scoped_release>(),
      "fp32 multiply-add rate in flop/s that all threads together reach in registers; measured in about 50 ms.");
}

}  // namespace llmc::bindings

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  py::module_::import("torch");  // the tensor casters need torch's Python half, whatever was imported first
  module.doc() = "The compiled core of llmc: GPT2 with its training step, and every operation of it in `ops`.";
  py::register_local_exception<llmc::Error>(module, "Error", PyExc_RuntimeError);
  llmc::bindings::register_ops(module);
  llmc::bindings::register_communicators(module);
  llmc::bindings::register_model(module);
  llmc::bindings::register_random(module);
  llmc::bindings::register_chess(module);
  llmc::bindings::register_build_info(module);
}
