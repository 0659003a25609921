#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace mdk {

// MDK_SHIM_DEVICE=capability,multiprocessors,shared bytes per block: what the launch tables see.
const Device& current_device() {
  static Device device;
  device = {90, 4, 232448, 233472};
  if (const char* text = std::getenv("MDK_SHIM_DEVICE"); text && *text) {
    if (std::sscanf(text, "%d,%d,%d", &device.capability, &device.multiprocessors,
                    &device.shared_per_block) != 3)
      throw std::runtime_error(std::string("MDK_SHIM_DEVICE is ") + text);
    device.shared_per_multiprocessor = device.shared_per_block + kSharedReserved;
  }
  return device;
}

void fail(cudaError_t error) { throw std::runtime_error("error " + std::to_string(error)); }

// What a launch on the device refuses.
void check_grid(const Grid& grid) {
  const Device& device = current_device();
  const bool good = grid.blocks > 0 && grid.blocks <= INT32_MAX && grid.threads > 0 &&
                    grid.threads <= 1024 && grid.threads % 32 == 0 && grid.cluster > 0 &&
                    grid.cluster <= (device.capability >= 90 ? 8 : 1) &&
                    grid.blocks % grid.cluster == 0 &&
                    grid.shared_bytes <= static_cast<size_t>(device.shared_per_block);
  if (!good)
    throw std::runtime_error("invalid launch: " + std::to_string(grid.blocks) + " blocks of " +
                             std::to_string(grid.threads) + " threads, cluster " +
                             std::to_string(grid.cluster) + ", shared memory " +
                             std::to_string(grid.shared_bytes));
}

}  // namespace mdk
