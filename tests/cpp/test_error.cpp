#include <gtest/gtest.h>

#include "core/error.h"

namespace torch_offload {
namespace {

TEST(ErrorTest, CheckInternalThrowsOnlyWhenTheConditionFails) {
  EXPECT_NO_THROW(check_internal(true, "never seen"));
  try {
    check_internal(false, "the moon is full");
    FAIL() << "nothing was thrown";
  } catch (const InternalError& error) {
    EXPECT_STREQ(error.what(), "torch_offload: internal error: the moon is full");
  }
}

/// The bindings catch by type: a type that derives from another would be caught as the wrong one.
TEST(ErrorTest, NoTypeIsCaughtAsAnother) {
  EXPECT_THROW(
      {
        try {
          throw ValueError("value");
        } catch (const TypeError&) {
          FAIL() << "ValueError was caught as TypeError";
        }
      },
      ValueError);
  EXPECT_THROW(
      {
        try {
          throw MemoryError("memory");
        } catch (const StateError&) {
          FAIL() << "MemoryError was caught as StateError";
        }
      },
      MemoryError);
  EXPECT_THROW(
      {
        try {
          throw InternalError("internal");
        } catch (const NotImplementedError&) {
          FAIL() << "InternalError was caught as NotImplementedError";
        }
      },
      InternalError);
}

}  // namespace
}  // namespace torch_offload
