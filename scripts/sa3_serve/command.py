"""The command `sa3_serve`: parse the flags, open the model and run the server."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_serve.settings import ServiceSettings, read_token
from sa3_trt_core import engines, shapes, targets
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, integer_type, number_type, run_command
from sa3_trt_core.cli.devices import choose_devices
from sa3_trt_core.cli.lora_flags import add_lora_flags, lora_options, lora_specs
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_serve.service import Service

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client",
          "python_multipart": "python-multipart"}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="sa3_serve", description="Serve Stable Audio 3 over HTTP with continuous batching.")
    model = parser.add_argument_group("model")
    model.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="default: %(default)s")
    model.add_argument(
        "--precision", choices=targets.PRECISIONS, default=targets.PRECISIONS[0], help="default: %(default)s"
    )
    model.add_argument("--backend", choices=engines.CHOICES, default=engines.AUTO, help=engines.AUTO_HELP)
    model.add_argument("--device", metavar="N", help="GPU index as in nvidia-smi -L, or cpu (default: 0)")
    add_folder_flags(model)
    model.add_argument("--offline", action="store_true", help="use only files of the hub's local cache")
    model.add_argument(
        "--chunk-frames", type=integer_type(0, shapes.MAX_FRAMES, "latent frames"), metavar="N", help="as in sa3_trt"
    )
    model.add_argument("--text-only", action="store_true",
                       help="do not load the audio encoder, and refuse requests with init_audio")  # fmt: skip
    add_lora_flags(parser, refits=True)
    _add_limits(parser)
    _add_server(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    usual, group = ServiceSettings(), parser.add_argument_group("limits")
    max_seconds = math.floor(usual.max_seconds * 100) / 100
    group.add_argument("--depth", type=integer_type(1, 64, "places"), default=usual.depth, metavar="D",
                       help="sounds in flight at a time (default: %(default)s)")  # fmt: skip
    group.add_argument("--queue", type=integer_type(1, 100_000, "requests"), default=usual.max_waiting, metavar="N",
                       help="queue length; further requests get 429 (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-seconds", type=number_type(shapes.MIN_SECONDS, max_seconds, "seconds"),
                       default=max_seconds, metavar="S", help="limit of a sound (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-steps", type=integer_type(1, 1000, "steps"), default=usual.max_steps, metavar="N",
                       help="limit of sampler steps (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-body", type=integer_type(1, 1 << 40, "bytes"), default=usual.max_body, metavar="BYTES",
                       help="size limit of a request body in bytes (default: %(default)s)")  # fmt: skip
    group.add_argument("--body-seconds", type=number_type(0.1, 3600, "seconds"), default=usual.body_seconds,
                       metavar="S", help="time limit for receiving a request body (default: %(default)s)")  # fmt: skip
    group.add_argument("--drain-seconds", type=number_type(1, 3600, "seconds"), default=usual.drain_seconds,
                       metavar="S", help="time to finish requests after SIGTERM (default: %(default)s)")  # fmt: skip


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="A", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=integer_type(0, 65535), default=8000, metavar="P", help="default: %(default)s")
    group.add_argument("--token-file", type=Path, metavar="F", help="require the bearer token in this file")
    group.add_argument("--log-prompts", action="store_true", help="write prompts and seeds to stderr")
    group.add_argument(
        "--access-log", action="store_true", help="write one line per request to stderr, without its body"
    )


def settings_of(args: argparse.Namespace) -> ServiceSettings:
    """Return the settings of the flags. Raises ToolError."""
    return ServiceSettings(
        depth=args.depth, max_waiting=args.queue, max_seconds=args.max_seconds, max_steps=args.max_steps,
        max_body=args.max_body, body_seconds=args.body_seconds, drain_seconds=args.drain_seconds,
        window=args.chunk_frames or ServiceSettings().window,
        token_digest=None if args.token_file is None else read_token(args.token_file),
        local=is_local(args.host), log_prompts=args.log_prompts, text_only=args.text_only,
    )  # fmt: skip


def is_local(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_packages() -> None:
    """Raise ToolError unless the packages of the extra `serve` are installed."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ToolError(f"sa3_serve needs {', '.join(missing)}", "pip install 'sa3-trt[serve]'")


def open_service(args: argparse.Namespace, settings: ServiceSettings) -> Service:
    """Open the model of the flags and start its ring. Raises ToolError."""
    from sa3_serve.service import Service
    from sa3_trt_core.lora.lora_set import read_loras
    from sa3_trt_core.model_loader import make_plan, plan_with
    from sa3_trt_core.paths import ModelSource
    from sa3_trt_core.pipeline import Generator

    source = ModelSource.of(args.onnx_root, args.models_dir, None, args.offline)
    plan = make_plan(args.dit, args.precision, args.backend, source, not args.text_only, args.chunk_frames)
    if args.lora or args.refit:
        plan = plan_with(plan, read_loras(lora_specs(args), lora_options(args)), args.lora_bases, args.refit)
    generator = Generator.open(plan)
    try:
        return Service(generator, settings, args.dit)
    except BaseException:
        generator.close()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and serve until a signal ends the process. Raises ToolError."""
    args = make_parser().parse_args(argv)
    require_packages()
    choose_devices(args.device, None)
    settings = settings_of(args)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from sa3_serve.app import create_app
    from sa3_serve.server import make_server

    service = open_service(args, settings)
    with service:
        server = make_server(service, create_app(service), args.host, args.port, args.access_log)
        listener = _bound(args)
        listener.listen()  # clients may connect as soon as the line below is printed
        port = listener.getsockname()[1]
        shown = f"[{args.host}]" if ":" in args.host else args.host
        print(f"listening on http://{shown}:{port}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    return 0


def ray_app(args: dict[str, str]) -> Any:
    """Return the service as a Ray Serve application: `serve run sa3_serve.command:ray_app onnx_root=DIR precision=fp8`.

    Every replica has its own model and ring, on one GPU unless device=cpu. Arguments are the flags.
    """
    if importlib.util.find_spec("ray") is None:
        raise ToolError("a Ray Serve application needs Ray", "pip install 'sa3-trt[serve,ray-serve]'")
    from ray import serve

    words = [f"--{name.replace('_', '-')}={value}" for name, value in args.items()]
    flags = make_parser().parse_args(words)
    # Clients reach the proxy of Ray Serve, under any host name.
    settings = replace(settings_of(flags), local=False)

    def build() -> Any:
        from sa3_serve.app import create_app

        choose_devices(flags.device, None)
        return create_app(open_service(flags, settings))

    options = {"num_cpus": 1, "num_gpus": 0 if flags.device == "cpu" else 1}
    max_ongoing = settings.depth + settings.max_waiting + 16  # above the queue limit this server itself answers 429
    deployment = serve.deployment(serve.ingress(build)(), ray_actor_options=options, max_ongoing_requests=max_ongoing)
    return deployment.bind()


def _bound(args: argparse.Namespace) -> socket.socket:
    """Return the bound socket to listen on. Raises ToolError."""
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((args.host.strip("[]"), args.port))
        return listener
    except OSError as error:
        raise ToolError(
            f"cannot listen on {args.host} port {args.port}: {error.strerror or error}",
            "choose another --port or --host",
        ) from None


def entry() -> None:
    """Run as a console command."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
