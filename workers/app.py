"""The Celery app of everything that is no lane worker: queries, maintenance, beat, Flower."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from creditlane.client import NOTICES, PAYMENTS, QUERIES
from creditlane.rabbitmq import LANES_EXCHANGE, is_rabbitmq
from models.settings import Settings, settings
from workers import flower_guard, unpacking

HEARTBEAT_SECONDS = 6
"""RabbitMQ takes a worker that is silent for two of them for gone, and gives its messages to the next."""

REDIS_OPTIONS = {
    "socket_keepalive": True,
    "socket_connect_timeout": 5,
    "socket_timeout": 30,
    "visibility_timeout": 12 * 3600,  # of the queues that are no lanes
    "global_keyprefix": "",
}

MAINTENANCE = "maintenance"
"""Besides those that producers know the queue of the general worker."""


def common_configuration(config: Settings) -> dict[str, Any]:
    """What every app of the project has in common."""
    broker = config.broker_url.get_secret_value()
    if config.result_url is not None:
        results = config.result_url.get_secret_value()
    else:
        results = "rpc://" if is_rabbitmq(broker) else broker
    broker_tls = config.tls(config.broker_url)
    result_tls = config.tls(config.result_url) if config.result_url is not None else broker_tls
    return {
        "broker_url": broker,
        "broker_use_ssl": broker_tls,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # for ever, and visible in the log
        "broker_channel_error_retry": True,  # such as a Redis that is full, or read-only while it fails over
        "broker_transport_options": {} if is_rabbitmq(broker) else REDIS_OPTIONS,
        "broker_connection_timeout": 5,
        "broker_heartbeat": HEARTBEAT_SECONDS,
        "result_backend": results,
        "redis_backend_use_ssl": result_tls,
        "result_expires": config.result_expires_seconds,
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": 5,
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "task_default_queue": MAINTENANCE,
        "task_routes": {f"{queue}.*": {"queue": queue} for queue in (QUERIES, NOTICES, PAYMENTS)},
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_time_limit": 3600,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        "worker_hijack_root_logger": True,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
        "task_track_started": True,
        "enable_utc": True,
        "timezone": "UTC",
        "worker_redirect_stdouts": False,
    }


def make_app(name: str, config: Settings | None = None) -> Celery:
    """A Celery app with the common configuration."""
    unpacking.install()
    app = Celery(name)
    app.conf.update(common_configuration(config or settings()))
    return app


app = make_app("creditlane")
if is_rabbitmq(app.conf.broker_url):
    # Producers may ask, mark notices as read and hand on webhooks: their exchange leads to these queues and the lanes.
    lanes_exchange = Exchange(LANES_EXCHANGE, type="direct")
    app.conf.task_queues = (
        *(Queue(name, exchange=lanes_exchange, routing_key=name) for name in (QUERIES, NOTICES, PAYMENTS)),
        Queue(MAINTENANCE, exchange=Exchange(""), routing_key=MAINTENANCE),
    )
flower_guard.install(app)
app.conf.imports = (
    "tasks.queries",
    "workers.checkout",
    "workers.inbox",
    "workers.notices",
    "workers.payments",
    "workers.receiving",
    "schedules.expiry",
    "schedules.audit",
    "schedules.codes",
    "schedules.notices",
    "schedules.outbox",
    "schedules.payments",
    "schedules.referrals",
    "schedules.retention",
    "schedules.seal",
    "schedules.transfers",
    "schedules.usage",
    "schedules.warnings",
)
