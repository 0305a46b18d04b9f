// What a compiled part was built for, as text that fastspec/_extension.py finds in the file before it loads it:
// a library for another torch or Python may load, and crash later.
#pragma once
#include <torch/version.h>

#define FASTSPEC_BUILT_FOR(python)                      \
  __attribute__((used)) static const char built_for[] = \
      "fastspec built for torch " TORCH_VERSION ", Python " python ";";
