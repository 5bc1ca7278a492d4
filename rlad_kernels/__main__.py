"""``python -m rlad_kernels``: the doctor; ``python -m rlad_kernels plan --help``: how many tokens fit into how much memory."""

import sys

from rlad_kernels.tools import doctor, plan

if __name__ == "__main__":
    sys.exit(plan.main(sys.argv[2:]) if sys.argv[1:2] == ["plan"] else doctor.main())
