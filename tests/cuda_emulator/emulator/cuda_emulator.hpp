// Everything a kernel's source sees of the emulator, in place of the CUDA runtime's headers.
#pragma once
#include "engine.hpp"
#include "language.hpp"
