"""What the scripts share: a run with its directory, phases, checkpoints and scores."""

import os
import sys

# First of all, for TorchRL loads MuJoCo, which fails where the OpenGL that is asked for is missing.
if "MUJOCO_GL" in os.environ:
    try:
        import mujoco  # noqa: F401
    except Exception as err:
        sys.exit(f"error: MUJOCO_GL={os.environ['MUJOCO_GL']}: MuJoCo cannot be loaded with it ({err}); unset it")
