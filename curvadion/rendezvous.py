"""`curvadion rendezvous`: the store at which the replicas of an `ElasticGroup` meet."""

import argparse
import signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--port", type=int, default=29600, help="0 takes a free one (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Run the store until the process is ended."""
    # Here, so that `curvadion rendezvous --help` is without torch; not in its stubs.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(args.host, args.port, is_master=True, wait_for_workers=False)
    print(f"replicas meet at port {store.port} of this machine, until this process ends", flush=True)
    signal.pause()
