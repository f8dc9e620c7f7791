#include "linear/schema.h"

VDIT_LIBRARY_FRAGMENT(VDIT_OP_NAMESPACE, m) { vdit::define_linear_schemas(m); }
