// Converts arguments, releases the GIL, nothing else: shapes, dtypes and contiguity were checked in Python. An address of 0 is an
// argument that is absent or a result that isn't wanted. Signatures are described in the headers, and in stn_fast/_C.pyi.
#include <pybind11/pybind11.h>

#include "augment.h"
#include "channel_epilogue.h"
#include "dropout.h"
#include "gated_embedding.h"
#include "gated_linear.h"
#include "gated_lstm_cell.h"
#include "isa.h"
#include "noise.h"
#include "openmp.h"
#include "perturb.h"
#include "random.h"

namespace py = pybind11;

namespace {

// A pointer travels as an integer, everything else as itself.
template <typename T>
struct Wire {
    using type = T;
    static T value(T argument) { return argument; }
};
template <typename T>
struct Wire<T*> {
    using type = std::uintptr_t;
    static T* value(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};

template <typename... Args>
auto released(void (*function)(Args...)) {
    return [function](typename Wire<Args>::type... arguments) {
        py::gil_scoped_release release;
        function(Wire<Args>::value(arguments)...);
    };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using Philox = void (*)(const std::uint32_t*, const std::uint32_t*, std::uint32_t*, std::int64_t, int);
    m.def("isa", &stn_fast::isa);
    m.def("vendor", &stn_fast::vendor);
    m.def("openmp", &stn_fast::openmp);
    m.def("full_team", &stn_fast::full_team);
    m.def("philox", released(static_cast<Philox>(&stn_fast::philox)));
    m.def("uniform", released(&stn_fast::uniform));
    m.def("normal", released(&stn_fast::normal));
    m.def("perturb_forward", released(&stn_fast::perturb_forward));
    m.def("perturb_backward", released(&stn_fast::perturb_backward));
    m.def("dropout", released(&stn_fast::dropout));
    m.def("noise_forward", released(&stn_fast::noise_forward));
    m.def("noise_backward", released(&stn_fast::noise_backward));
    m.def("augment", released(&stn_fast::augment));
    m.def("gated_embedding_forward", released(&stn_fast::gated_embedding_forward));
    m.def("gated_embedding_backward", released(&stn_fast::gated_embedding_backward));
    m.def("gated_epilogue_forward", released(&stn_fast::gated_epilogue_forward));
    m.def("gated_epilogue_backward", released(&stn_fast::gated_epilogue_backward));
    m.def("gated_lstm_cell_forward", released(&stn_fast::gated_lstm_cell_forward));
    m.def("gated_lstm_cell_backward", released(&stn_fast::gated_lstm_cell_backward));
    m.def("lstm_cell_tangent", released(&stn_fast::lstm_cell_tangent));
    m.def("channel_epilogue_forward", released(&stn_fast::channel_epilogue_forward));
    m.def("channel_epilogue_backward", released(&stn_fast::channel_epilogue_backward));
    m.def("transpose", released(&stn_fast::transpose));
}
