"""`python -m rwkv_es`: the same as the `rwkv-es` command."""

import sys

from rwkv_es.cli import main

if __name__ == "__main__":
    sys.exit(main())
