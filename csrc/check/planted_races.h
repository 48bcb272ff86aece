#pragma once

#include "core/device.h"

/// The calls of the published races that a Device can make; see published_races(). Each function
/// makes those of the report if `planted`, else those of its clean twin.
namespace torch_offload::planted {

/// H1, https://github.com/huggingface/diffusers/issues/13502:
/// kernels never wait for the copy.
void compute_without_waiting(Device& device, bool planted);
/// H2, https://github.com/huggingface/diffusers/issues/12673:
/// the current stream was asked for inside the copy stream's context.
void ask_for_the_stream_inside(Device& device, bool planted);
/// H3, https://github.com/huggingface/diffusers/issues/14657:
/// weights freed by the host while kernels still read them.
void free_while_kernels_read(Device& device, bool planted);
/// H5, https://github.com/huggingface/trl/issues/7195:
/// the compute stream was kept from the beginning; the caller used another.
void keep_the_stream(Device& device, bool planted);
/// H6, https://github.com/huggingface/trl/issues/7195:
/// one more copy on the copy stream, after the wait was taken.
void copy_after_the_wait(Device& device, bool planted);
/// H7, https://github.com/pytorch/pytorch/issues/160481:
/// the event is recorded on one stream, wherever the work was.
void record_on_a_fixed_stream(Device& device, bool planted);
/// H8, https://github.com/pytorch/pytorch/issues/180665:
/// freed as far as its own stream is concerned, while another still reads it.
void free_on_its_own_stream(Device& device, bool planted);
/// H9, https://github.com/pytorch/pytorch/issues/180666:
/// the host reads the destination of a copy that has not drained.
void read_before_the_copy_has_drained(Device& device, bool planted);
/// H10, https://github.com/vipshop/cache-dit/issues/1111:
/// one weight, two owners: the second one's prefetch comes while the first one's kernels run.
void prefetch_for_a_second_owner(Device& device, bool planted);
/// H13, https://github.com/rapidsai/cudf/issues/22321:
/// the source goes while the copy is in flight.
void give_up_the_source(Device& device, bool planted);
/// H14, https://github.com/pytorch/pytorch/issues/178142:
/// two places, copies that run ahead, and kernels that are never that slow in tests.
void prefetch_faster_than_kernels(Device& device, bool planted);
/// H15, https://github.com/sgl-project/sglang/issues/29166:
/// what a capture waits for must have been recorded in it; its events are a set of their own.
void wait_for_an_event_of_another_set(Device& device, bool planted);
/// H16, https://github.com/flagos-ai/Torch-FL/issues/62:
/// a copy on the default stream, which a reader elsewhere took for done.
void copy_on_the_default_stream(Device& device, bool planted);
/// H17, https://github.com/huggingface/diffusers/issues/11981:
/// another unit came than the one that was copied ahead into the place.
void use_what_was_not_copied(Device& device, bool planted);
/// H18, https://github.com/vllm-project/vllm/issues/54975:
/// three units in two places: at the wrap-around the copy waits for the place just left.
void wait_for_the_other_place(Device& device, bool planted);

}  // namespace torch_offload::planted
