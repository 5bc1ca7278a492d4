import sys

from rlad_kernels.tools.compile_gate.gate import main

if __name__ == "__main__":
    sys.exit(main())
