#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace torch_offload {

/// How many ops of a stream have been submitted: the n-th has epoch n.
using Epoch = std::uint32_t;

/// Vector clocks: what each stream, each event and the host know to be done of every stream.
///
/// The host needs no entry of its own: whatever is submitted comes after all that the host did.
class Clocks {
 public:
  using StreamIndex = std::uint32_t;  // dense, of the streams that a log names
  using EventIndex = std::uint32_t;   // likewise

  /// Forgets everything; all streams are at their beginning.
  void reset(std::size_t num_streams, std::size_t num_events) {
    width_ = num_streams;
    streams_.assign(num_streams * num_streams, 0);
    host_.assign(num_streams, 0);
    events_.assign(num_events * num_streams, 0);
    seen_host_.assign(num_streams, 0);
    host_version_ = 0;
  }

  /// One more op on `stream`, behind the one before it and behind what the host has seen.
  Epoch submit(StreamIndex stream) {
    Epoch* row = streams_.data() + stream * width_;
    if (seen_host_[stream] != host_version_) {
      join(row, host_.data());
      seen_host_[stream] = host_version_;
    }
    return ++row[stream];
  }

  void record(EventIndex event, StreamIndex stream) {
    std::copy_n(of_stream(stream), width_, events_.data() + event * width_);
  }
  void wait(StreamIndex stream, EventIndex event) {
    join(streams_.data() + stream * width_, events_.data() + event * width_);
  }
  /// The host has seen the event done.
  void host_waited_for_event(EventIndex event) {
    join(host_.data(), events_.data() + event * width_);
    ++host_version_;
  }
  void host_waited_for_stream(StreamIndex stream) {
    join(host_.data(), of_stream(stream));
    ++host_version_;
  }

  /// By stream: the epoch up to which it is known to be done.
  const Epoch* of_stream(StreamIndex stream) const { return streams_.data() + stream * width_; }
  const Epoch* of_host() const { return host_.data(); }
  /// As recorded last.
  const Epoch* of_event(EventIndex event) const { return events_.data() + event * width_; }

 private:
  void join(Epoch* into, const Epoch* from) const {
    for (std::size_t i = 0; i < width_; ++i) {
      into[i] = std::max(into[i], from[i]);
    }
  }

  std::size_t width_ = 0;
  std::vector<Epoch> streams_;  // a row each
  std::vector<Epoch> events_;   // a row each, as recorded last
  std::vector<Epoch> host_;
  std::vector<std::uint32_t> seen_host_;  // by stream: the version of host_ that is in its row
  std::uint32_t host_version_ = 0;
};

}  // namespace torch_offload
