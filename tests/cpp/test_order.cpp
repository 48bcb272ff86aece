#include <gtest/gtest.h>

#include <type_traits>
#include <vector>

#include "core/order.h"

namespace torch_offload {
namespace {

using Sequence = std::vector<UnitIndex>;

static_assert(!std::is_copy_constructible_v<Order> && !std::is_move_constructible_v<Order>,
              "an Order points into itself");

/// One pass; returns how many of its units were not expected.
int surprises_in_pass(Order& order, const Sequence& sequence, bool completed = true) {
  order.begin_pass();
  int surprises = 0;
  for (const UnitIndex unit : sequence) {
    surprises += order.advance(unit) ? 0 : 1;
  }
  order.end_pass(completed);
  return surprises;
}

Sequence next_units(const Order& order, std::size_t count) {
  Order::Walk walk = order.walk();
  Sequence units;
  for (std::size_t i = 0; i < count; ++i) {
    units.push_back(walk.next());
  }
  return units;
}

TEST(OrderTest, BeforeAnyPassTheStaticOrderIsExpectedAgainAndAgain) {
  const Order order({2, 0, 1});
  EXPECT_EQ(next_units(order, 7), (Sequence{2, 0, 1, 2, 0, 1, 2}));
}

TEST(OrderTest, WithoutUnitsNothingIsExpected) {
  Order order({});
  EXPECT_EQ(order.walk().next(), kNoUnit);
  EXPECT_EQ(surprises_in_pass(order, {}), 0);
  EXPECT_EQ(order.walk().next(), kNoUnit);
}

TEST(OrderTest, ExactRepeatHasNoSurprise) {
  Order order({0, 1, 2, 3});
  for (int pass = 0; pass < 4; ++pass) {
    EXPECT_EQ(surprises_in_pass(order, {0, 1, 2, 3}), 0);
  }
}

TEST(OrderTest, AnotherOrderThanTheStaticOneIsLearnedInOnePass) {
  Order order({0, 1, 2, 3});
  const Sequence sequence{3, 1, 2, 0};
  EXPECT_GT(surprises_in_pass(order, sequence), 0);
  EXPECT_EQ(next_units(order, 8), (Sequence{3, 1, 2, 0, 3, 1, 2, 0}));
  EXPECT_EQ(surprises_in_pass(order, sequence), 0);
}

TEST(OrderTest, OneUnitUsedManyTimesIsFollowedByTheRightOneEachTime) {
  Order albert({0, 1});
  const Sequence twelve_layers{0, 1, 0, 1, 0, 1, 0, 1};
  surprises_in_pass(albert, twelve_layers);
  EXPECT_EQ(next_units(albert, 10), (Sequence{0, 1, 0, 1, 0, 1, 0, 1, 0, 1}));
  EXPECT_EQ(surprises_in_pass(albert, twelve_layers), 0);

  Order zamba({0, 1, 2, 3, 9});
  const Sequence shared_block{0, 9, 1, 2, 9, 3, 9};
  surprises_in_pass(zamba, shared_block);
  EXPECT_EQ(surprises_in_pass(zamba, shared_block), 0);
  EXPECT_EQ(surprises_in_pass(zamba, shared_block), 0);
}

TEST(OrderTest, PassesOfOneUnit) {
  Order order({0});
  for (int pass = 0; pass < 3; ++pass) {
    EXPECT_EQ(surprises_in_pass(order, {0}), 0);
  }
  EXPECT_EQ(next_units(order, 3), (Sequence{0, 0, 0}));
}

TEST(OrderTest, PassWithoutUnitsChangesNothing) {
  Order order({0, 1});
  surprises_in_pass(order, {0, 1});
  surprises_in_pass(order, {});
  EXPECT_EQ(surprises_in_pass(order, {0, 1}), 0);
}

TEST(OrderTest, AlternatingPassesAreToldApartAndExpectedInTurn) {
  Order order({0, 1, 2, 3});
  const Sequence encoder{0, 1};
  const Sequence decoder{2, 3};
  for (int round = 0; round < 2; ++round) {
    surprises_in_pass(order, encoder);
    surprises_in_pass(order, decoder);
  }
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(surprises_in_pass(order, encoder), 0) << round;
    EXPECT_EQ(surprises_in_pass(order, decoder), 0) << round;
  }
}

/// `generate` of an encoder-decoder: a pass that repeats the one before it holds no surprise.
TEST(OrderTest, EncoderThenManyDecoderPassesThenEncoder) {
  const Sequence encoder{0, 1, 2};
  const Sequence decoder{3, 4, 5, 6};
  for (const int num_decoder_passes : {2, 3, 7}) {
    Order order({0, 1, 2, 3, 4, 5, 6});
    surprises_in_pass(order, encoder);
    surprises_in_pass(order, decoder);
    surprises_in_pass(order, decoder);
    for (int round = 0; round < 4; ++round) {
      // Where a run of passes ends is not known beforehand: one wrong guess, at its end.
      EXPECT_LE(surprises_in_pass(order, encoder), 1) << round;
      for (int pass = 0; pass < num_decoder_passes; ++pass) {
        const int surprises = surprises_in_pass(order, decoder);
        if (round > 0) {
          EXPECT_EQ(surprises, 0) << num_decoder_passes << " passes, round " << round << ", pass "
                                  << pass;
        }
      }
    }
  }
}

TEST(OrderTest, SkippedUnitIsOneSurpriseAndTheRestIsExpected) {
  Order order({0, 1, 2, 3, 4, 5});
  surprises_in_pass(order, {0, 1, 2, 3, 4, 5});
  order.begin_pass();
  EXPECT_TRUE(order.advance(0));
  EXPECT_FALSE(order.advance(3));
  EXPECT_EQ(next_units(order, 3), (Sequence{4, 5, 0}));
  EXPECT_TRUE(order.advance(4));
  EXPECT_TRUE(order.advance(5));
  order.end_pass(true);
}

TEST(OrderTest, RepeatedUnitIsOneSurpriseAndTheRestIsExpected) {
  Order order({0, 1, 2, 3});
  surprises_in_pass(order, {0, 1, 2, 3});
  EXPECT_EQ(surprises_in_pass(order, {0, 1, 1, 2, 3}), 1);
  EXPECT_EQ(surprises_in_pass(order, {0, 1, 1, 2, 3}), 0);
}

TEST(OrderTest, EarlyExitExpectsTheStartOfTheNextPass) {
  Order order({0, 1, 2, 3});
  surprises_in_pass(order, {0, 1, 2, 3});
  EXPECT_EQ(surprises_in_pass(order, {0, 1}), 0);
  EXPECT_EQ(next_units(order, 4), (Sequence{0, 1, 0, 1}));
  // A longer pass again: one surprise where it goes on, then the static order is followed.
  EXPECT_EQ(surprises_in_pass(order, {0, 1, 2, 3}), 1);
  EXPECT_EQ(surprises_in_pass(order, {0, 1, 2, 3}), 0);
}

TEST(OrderTest, AbortedPassTeachesNothing) {
  Order order({0, 1, 2, 3});
  const Sequence learned{0, 2, 1, 3};
  surprises_in_pass(order, learned);
  surprises_in_pass(order, learned);
  for (const Sequence& aborted : {Sequence{0}, Sequence{0, 3}, Sequence{3, 1}, Sequence{}}) {
    surprises_in_pass(order, aborted, /*completed=*/false);
    EXPECT_EQ(next_units(order, 8), (Sequence{0, 2, 1, 3, 0, 2, 1, 3}));
    EXPECT_EQ(surprises_in_pass(order, learned), 0);
    EXPECT_EQ(surprises_in_pass(order, learned), 0) << "what follows was learned from an abort";
  }
}

TEST(OrderTest, AbortedFirstPassLeavesTheStaticOrder) {
  Order order({0, 1, 2});
  surprises_in_pass(order, {2, 1}, /*completed=*/false);
  EXPECT_EQ(next_units(order, 3), (Sequence{0, 1, 2}));
}

TEST(OrderTest, UnitOutsideTheLearnedPassIsFollowedAsTheStaticOrderSays) {
  Order order({0, 1, 2, 3, 4});
  surprises_in_pass(order, {0, 4});
  order.begin_pass();
  EXPECT_TRUE(order.advance(0));
  EXPECT_FALSE(order.advance(2));
  EXPECT_EQ(next_units(order, 2), (Sequence{3, 4}));
}

}  // namespace
}  // namespace torch_offload
