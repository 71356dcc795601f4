"""`python -m curvadion.titan --module ... --config ...`: torchtitan's own trainer, also on CPU and on torch
before 2.14."""

from torchtitan.train import main

if __name__ == "__main__":
    main()
