// An oracle for each op: whether a question is sound, and whether the outputs are its answer.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "question.h"

namespace fuzz {

bool is_sound_linear(const Question&);
std::string judge_linear(const Question&, const std::vector<Array>& outputs);
bool is_sound_two_level(const Question&);
std::string judge_two_level(const Question&, const std::vector<Array>& outputs);

bool is_sound_attention(const Question&);
std::string judge_attention(const Question&, const std::vector<Array>& outputs);

bool is_sound_scan(const Question&);
std::string judge_scan(const Question&, const std::vector<Array>& outputs);

bool is_sound_convolution(const Question&);
std::string judge_convolution(const Question&, const std::vector<Array>& outputs);

bool is_sound_pointwise(const Question&);
std::string judge_pointwise(const Question&, const std::vector<Array>& outputs);

}  // namespace fuzz
