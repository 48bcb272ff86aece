#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "core/device.h"
#include "core/device_memory.h"
#include "core/file_mapping.h"
#include "core/host_mapping.h"
#include "core/loader.h"
#include "core/locked_files.h"
#include "core/packed_loader.h"
#include "core/plan.h"
#include "lanes/memory_file.h"
#include "lanes/mutant_masters.h"

#ifndef TORCH_OFFLOAD_MUTANTS
#error "a mutant needs the loaders whose steps can be left out"
#endif

namespace torch_offload::lanes {

/// How much of checkpoint files may be locked, in units, each of which is a chunk.
struct FileLimits {
  bool are_used = false;
  std::size_t told = SIZE_MAX;  ///< To us.
  std::size_t met = SIZE_MAX;   ///< Of the device.
};

/// Brings units into their places: out of their masters, out of a checkpoint file, or packed.
class MutantLoader : public Loader {
 public:
  MutantLoader(Device& device, MutantMasters& masters) : device_(device), masters_(masters) {}

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override {
    generations[unit] = generation;
    if (packed_ && packed_->has_source(unit)) {
      return packed_->load(unit, place, copy_stream, generation);
    }
    const std::size_t size_bytes = masters_.size_bytes(unit);
    if (files_) {
      files_->load(files_->cut({{source_in_file(unit), 0, size_bytes}}), copy_stream,
                   [&](const CopySegment& segment) {
                     device_.copy(copy_stream, {place + segment.offset, segment.source,
                                                segment.size_bytes, unit, generation});
                   });
      return copy_stream;
    }
    // In two pieces: the second may fail when the first is under way.
    const std::size_t half = size_bytes / 2;
    const std::byte* master = masters_.memory(unit);
    device_.copy(copy_stream, {place, master, half, unit, generation});
    device_.copy(copy_stream, {place + half, master + half, size_bytes - half, unit, generation});
    return copy_stream;
  }
  std::vector<StreamId> own_streams() const override {
    return packed_ ? packed_->own_streams() : std::vector<StreamId>{};
  }
  StreamId first_writer(UnitIndex unit, StreamId copy_stream) const override {
    return packed_ ? packed_->first_writer(unit, copy_stream) : copy_stream;
  }

  // --- packed units: nothing is packed here, see AdversaryDevice ---------------------------------

  /// From here on units go through a staging ring, or stay packed, as is said of each.
  void pack(const std::vector<Transport>& transports) {
    PackedLoader::Options options;
    options.resident_bytes.resize(transports.size());
    for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
      const std::size_t size_bytes = masters_.size_bytes(unit);
      if (transports[unit] == Transport::kPacked) {
        options.slot_bytes = std::max(options.slot_bytes, size_bytes);
      } else if (transports[unit] == Transport::kPackedResident) {
        options.resident_bytes[unit] = size_bytes;
      }
    }
    packed_.emplace(device_, transports.size(), options);
    for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
      if (transports[unit] == Transport::kPacked) {
        packed_->set_source(unit, source_of(unit, masters_.memory(unit)));
      }
    }
  }
  void upload_all() {
    for (UnitIndex unit = 0; unit < masters_.units().size(); ++unit) {
      upload(unit);
    }
  }
  /// By way of memory that all units share.
  void upload(UnitIndex unit) {
    if (packed_ && packed_->has_room(unit)) {
      const std::size_t size_bytes = masters_.size_bytes(unit);
      device_.host_write(masters_.shared(), size_bytes, unit);
      std::memcpy(masters_.shared(), masters_.memory(unit), size_bytes);
      packed_->upload(unit, source_of(unit, masters_.shared()));
    }
  }
  /// From here on all are raw.
  void drop_packed() { packed_.reset(); }

  // --- a checkpoint file -------------------------------------------------------------------------

  /// From here on units are what the masters are now, read out of a file.
  void open_file(std::size_t most_chunks) {
    const std::size_t page = HostMapping::page_bytes();
    std::vector<std::byte> bytes(masters_.units().size() * page);
    for (UnitIndex unit = 0; unit < masters_.units().size(); ++unit) {
      std::memcpy(bytes.data() + unit * page, masters_.memory(unit), masters_.size_bytes(unit));
    }
    file_ = std::make_shared<const FileMapping>(MemoryFile(bytes).path());
    const std::shared_ptr<Device> borrowed(std::shared_ptr<Device>(), &device_);
    const std::size_t most_bytes =
        most_chunks == SIZE_MAX ? LockedFiles::kNoLimit : most_chunks * page;
    files_ =
        std::make_unique<LockedFiles>(borrowed, std::vector{file_}, most_bytes, page, HostLimits{});
  }
  void close_file() { files_.reset(); }

  /// Brings the unit to the device for good, out of pages that are locked for this once. Kernels of
  /// the current stream may read it.
  const std::byte* bring_resident(UnitIndex unit, StreamId copies) {
    const std::size_t size_bytes = masters_.size_bytes(unit);
    std::byte* const memory = residents_.emplace_back(device_, size_bytes).memory();
    const std::vector<CopySegment> segments = files_->cut({{source_in_file(unit), 0, size_bytes}});
    files_->lock(segments, LockedFiles::Hold::kOnce);
    order_after(copies, device_.current_stream());
    files_->submit(segments, copies, [&](const CopySegment& segment) {
      device_.copy(copies,
                   {memory + segment.offset, segment.source, segment.size_bytes, kNoUnit, 0});
    });
    order_after(device_.current_stream(), copies);
    return memory;
  }
  void unlock_residents() { files_->unlock_once(); }
  /// Nothing may be in flight to or from them.
  void drop_residents() { residents_.clear(); }

  std::map<UnitIndex, std::uint64_t> generations;  // of the last onloads

 private:
  PackedSource source_of(UnitIndex unit, const std::byte* memory) const {
    const std::size_t size_bytes = masters_.size_bytes(unit);
    return {memory, size_bytes, size_bytes, 1};
  }
  const std::byte* source_in_file(UnitIndex unit) const {
    return file_->data() + unit * HostMapping::page_bytes();
  }
  void order_after(StreamId later, StreamId earlier) {
    const EventId event = device_.create_event();
    device_.record(event, earlier);
    device_.wait(later, event);
  }

  Device& device_;
  MutantMasters& masters_;
  std::optional<PackedLoader> packed_;
  std::shared_ptr<const FileMapping> file_;
  std::unique_ptr<LockedFiles> files_;
  std::vector<DeviceMemory> residents_;
};

}  // namespace torch_offload::lanes
