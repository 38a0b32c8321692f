// Sizes of token trees that every kernel shares.
#pragma once

namespace specexit {

constexpr int MAX_NODES = 256;
constexpr int WORD = 64;  // bits of visible scratch slots in a word
constexpr int MAX_WORDS = MAX_NODES / WORD;

}  // namespace specexit
