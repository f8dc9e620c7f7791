// The family's launch structs are its public interface, so they live with the installed headers.
#pragma once
#include "vdit/linear.h"
