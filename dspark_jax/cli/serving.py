"""The commands of the server, one function each."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

from dspark_jax.cli.given import key_in, load_model

logger = logging.getLogger(__name__)


def serve(args: argparse.Namespace) -> int:
    """Serve OpenAI's interface until a signal comes."""
    try:
        from dspark_jax.serving import app, served, server
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serve needs {error.name}, which is not installed: pip install 'dspark-jax[serve]'"
        ) from None
    from dspark_jax.engine.config import EngineConfig

    if not 0 <= args.drain_s < math.inf:
        raise ValueError(f"--drain-s is {args.drain_s}: give 0 or more")
    key = args.api_key if args.api_key_file is None else key_in(Path(args.api_key_file))
    settings = app.Settings(
        api_key=key,
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout,
        cors_origin=args.cors_origin,
    )
    given = ("slots", "positions", "queue", "policy", "acceptance", "kernels", "prefix_bytes")
    config = EngineConfig(**{name: getattr(args, name) for name in given})
    import jax

    socket = None if jax.process_index() else server.listen(args.host, args.port)
    model = load_model(args)
    with model.engine_of(config) as engine:
        if engine.follows or socket is None:
            engine.follow()
            return 0
        service = app.Service(served.serve_model(model, engine.start(), args.name), settings)
        name, port = service.served.name, socket.getsockname()[1]
        logger.info("%s at http://%s:%d", name, args.host, port)
        if args.host not in ("127.0.0.1", "::1", "localhost") and not key:
            logger.warning("anybody who reaches %s may use it: --api-key-file asks for a key", name)
        server.run(service, socket, args.drain_s)
    return 0
