// Torch-free names of the floating dtypes that every op accepts.
#pragma once

namespace shiva {

enum class Dtype { Float32, BFloat16, Float16, Float64 };

}  // namespace shiva
