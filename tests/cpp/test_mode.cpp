#include <gtest/gtest.h>

#include <set>
#include <string>
#include <tuple>

#include "core/error.h"
#include "core/mode.h"

namespace torch_offload {
namespace {

constexpr Mode kModes[] = {Mode::kSync, Mode::kStreams, Mode::kEvents, Mode::kPipeline};

TEST(ModeTest, NamesParseBackToTheirModes) {
  for (const Mode mode : kModes) {
    EXPECT_EQ(parse_mode(name_of(mode)), mode);
  }
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    EXPECT_EQ(parse_stream_layout(name_of(layout)), layout);
  }
  EXPECT_STREQ(name_of(Mode::kPipeline), "pipeline");
  EXPECT_STREQ(name_of(StreamLayout::kSplit), "split");
}

TEST(ModeTest, UnknownNameThrowsAndListsTheNamesThereAre) {
  for (const std::string name : {"", "Pipeline", "fast", "sync "}) {
    try {
      parse_mode(name);
      FAIL() << "accepted '" << name << "'";
    } catch (const ValueError& error) {
      const std::string message = error.what();
      for (const Mode mode : kModes) {
        EXPECT_NE(message.find(name_of(mode)), std::string::npos) << message;
      }
      EXPECT_NE(message.find("'" + name + "'"), std::string::npos) << message;
    }
  }
  EXPECT_THROW(parse_stream_layout("both"), ValueError);
}

TEST(PolicyTest, EachModeIsAPolicyOfItsOwn) {
  std::set<std::tuple<bool, bool, Lookahead>> policies;
  for (const Mode mode : kModes) {
    const Policy policy = policy_of(mode);
    policies.emplace(policy.has_copy_stream, policy.host_synchronizes, policy.lookahead);
  }
  EXPECT_EQ(policies.size(), 4U);
}

TEST(PolicyTest, OnlyModesWithoutHostWaitsLookAhead) {
  for (const Mode mode : kModes) {
    const Policy policy = policy_of(mode);
    EXPECT_EQ(policy.host_synchronizes, policy.lookahead == Lookahead::kNone) << name_of(mode);
  }
  EXPECT_FALSE(policy_of(Mode::kSync).has_copy_stream);
  EXPECT_TRUE(policy_of(Mode::kStreams).has_copy_stream);
}

}  // namespace
}  // namespace torch_offload
