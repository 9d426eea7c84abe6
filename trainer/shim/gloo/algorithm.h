// Nothing that c10d/ProcessGroupGloo.hpp declares needs it.
#pragma once
