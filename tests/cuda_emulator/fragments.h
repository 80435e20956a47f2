// Which element of a matrix lane `lane` holds as element `e` of its fragment (csrc/cuda/mma.cuh). 16-bit elements come two to a
// register. compare_with_cute.cpp holds this against an independent source.
#pragma once

namespace emulator {

struct At {
  int row, column;
};

constexpr At in_d(int lane, int e) { return {lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2}; }

constexpr At in_a_16bit(int lane, int e) { return {lane / 4 + e / 2 % 2 * 8, lane % 4 * 2 + e % 2 + e / 4 * 8}; }
constexpr At in_b_16bit(int lane, int e) { return {lane % 4 * 2 + e % 2 + e / 2 * 8, lane / 4}; }

constexpr At in_a_tf32(int lane, int e) { return {lane / 4 + e % 2 * 8, lane % 4 + e / 2 * 4}; }
constexpr At in_b_tf32(int lane, int e) { return {lane % 4 + e * 4, lane / 4}; }

// Of 8 x 8 matrix number e / 2, whose row r comes from the address that lane 8 (e / 2) + r names.
constexpr At in_loaded(int lane, int e) { return {lane / 4, lane % 4 * 2 + e % 2}; }
constexpr At in_loaded_transposed(int lane, int e) { return {lane % 4 * 2 + e % 2, lane / 4}; }

}  // namespace emulator
