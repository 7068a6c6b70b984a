"""The Celery app of a lane worker: ``celery -A workers.lane_app worker --pool solo``."""

from __future__ import annotations

from celery import Celery

from creditlane.contract import BATCH, OPERATIONS
from creditlane.rabbitmq import is_rabbitmq
from models.settings import settings
from workers.app import make_app
from workers.lane_consumer import LaneStep, LedgerTask
from workers.rabbit_lanes import READ_SECONDS

NO_QUEUE = "lanes"
"""Lane workers begin without a queue: which lanes they consume is decided as they run."""


def make_lane_app() -> Celery:
    """A Celery app whose worker takes lanes and applies their operations in batches."""
    app = make_app("creditlane.lanes")
    app.conf.update(
        task_default_queue=NO_QUEUE,
        worker_consumer="workers.lane_consumer:LaneConsumer",
        worker_pool="solo",
        worker_prefetch_multiplier=settings().batch_messages,
        worker_disable_rate_limits=True,
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    if is_rabbitmq(app.conf.broker_url):
        app.conf.broker_transport = "workers.rabbit_lanes:Transport"
        app.conf.broker_transport_options = {"read_timeout": READ_SECONDS}
    else:
        app.conf.broker_transport = "workers.redis_lanes:Transport"
    for name in (*OPERATIONS, BATCH):
        app.register_task(type(name, (LedgerTask,), {"name": name, "__module__": __name__})())
    app.steps["consumer"].add(LaneStep)
    app.amqp.queues.deselect([NO_QUEUE])
    return app


app = make_lane_app()
