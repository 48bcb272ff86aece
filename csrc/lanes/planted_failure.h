#pragma once

#include <stdexcept>

namespace torch_offload {

/// What a lane throws where a model or a device would.
class PlantedFailure : public std::runtime_error {
 public:
  PlantedFailure() : std::runtime_error("planted failure") {}
};

}  // namespace torch_offload
