#include "vq/schema.h"

VDIT_LIBRARY_FRAGMENT(VDIT_OP_NAMESPACE, m) { vdit::define_vq_schemas(m); }
