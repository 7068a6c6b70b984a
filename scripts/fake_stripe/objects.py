"""The objects of Stripe's API as release 2026-10-28.endive writes them: plain dictionaries, other objects by their ids.

Amounts are in Stripe's smallest units, times in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

API_VERSION = "2026-10-28.endive"

Json = dict[str, Any]


def _empty(names: str) -> Json:
    return dict.fromkeys(names.split())


def listed(data: Sequence[Any], url: str, *, has_more: bool = False, total: int | None = None) -> Json:
    """A list as it is answered, or stands within an object."""
    counted = {} if total is None else {"total_count": total}
    return {"object": "list", "data": list(data), "has_more": has_more, "url": url} | counted


def price(id: str, *, product: str, amount: int, currency: str, created: int, livemode: bool,
          interval: str | None = None, count: int = 1) -> Json:  # fmt: skip
    """What is sold at a price; with an interval (day, week, month, year), again every ``count`` of them."""
    recurring = {
        "interval": interval, "interval_count": count, "meter": None, "trial_period_days": None,
        "usage_type": "licensed",
    }  # fmt: skip
    return {
        "id": id,
        "object": "price",
        "active": True,
        "billing_scheme": "per_unit",
        "created": created,
        "currency": currency,
        "livemode": livemode,
        "metadata": {},
        "product": product,
        "recurring": recurring if interval else None,
        "tax_behavior": "unspecified",
        "type": "recurring" if interval else "one_time",
        "unit_amount": amount,
        "unit_amount_decimal": str(amount),
    } | _empty("custom_unit_amount lookup_key nickname tiers_mode transform_quantity")


def _plan(priced: Json) -> Json:
    """The old way to write a price that recurs, which items of subscriptions still have beside the new one."""
    kept = ("id", "active", "billing_scheme", "created", "currency", "livemode", "metadata", "nickname", "product",
            "tiers_mode")  # fmt: skip
    return {key: priced[key] for key in kept} | {
        "object": "plan",
        "amount": priced["unit_amount"],
        "amount_decimal": priced["unit_amount_decimal"],
        "transform_usage": None,
    } | dict(priced["recurring"])  # fmt: skip


def customer(id: str, *, created: int, livemode: bool, email: str | None, name: str | None,
             metadata: Mapping[str, str]) -> Json:  # fmt: skip
    """Who buys."""
    return {
        "id": id,
        "object": "customer",
        "balance": 0,
        "created": created,
        "delinquent": False,
        "email": email,
        "invoice_prefix": id[-8:].upper(),
        "invoice_settings": _empty("custom_fields default_payment_method footer rendering_options"),
        "livemode": livemode,
        "metadata": dict(metadata),
        "name": name,
        "preferred_locales": [],
        "tax_exempt": "none",
    } | _empty("address currency default_source description phone shipping test_clock")


def line_item(id: str, priced: Json, quantity: int, discount: int, description: str) -> Json:
    """A line of a checkout session."""
    subtotal = priced["unit_amount"] * quantity
    return {
        "id": id,
        "object": "item",
        "adjustable_quantity": None,
        "amount_discount": discount,
        "amount_subtotal": subtotal,
        "amount_tax": 0,
        "amount_total": subtotal - discount,
        "currency": priced["currency"],
        "description": description,
        "metadata": {},
        "price": priced,
        "quantity": quantity,
    }


def session(id: str, *, created: int, livemode: bool, expires_at: int, lines: Sequence[Json], currency: str | None,
            url: str, invoice_creation: bool, **given: Any) -> Json:  # fmt: skip
    """A checkout session that is open.

    :param given: the fields that the request fills.
    """
    subtotal = sum(line["amount_subtotal"] for line in lines)
    discount = sum(line["amount_discount"] for line in lines)
    invoice_data = _empty("account_tax_ids custom_fields description footer issuer rendering_options")
    made = {"enabled": invoice_creation, "invoice_data": invoice_data | {"metadata": {}}}
    return _empty(
        "after_expiration allow_promotion_codes billing_address_collection cancel_url client_reference_id client_secret"
        " consent consent_collection currency_conversion customer customer_account customer_creation customer_email"
        " integration_identifier invoice locale origin_context payment_intent payment_link recovered_from setup_intent"
        " shipping_address_collection shipping_cost submit_type subscription success_url wallet_options"
    ) | {
        "id": id,
        "object": "checkout.session",
        "adaptive_pricing": {"enabled": False},
        "amount_subtotal": subtotal,
        "amount_total": subtotal - discount,
        "automatic_tax": {"enabled": False} | _empty("liability provider status"),
        "branding_settings": {},
        "collected_information": _empty("business_name individual_name shipping_details"),
        "created": created,
        "currency": currency,
        "custom_fields": [],
        "custom_text": _empty("after_submit shipping_address submit terms_of_service_acceptance"),
        "customer_details": None,
        "discounts": [],
        "expires_at": expires_at,
        "invoice_creation": made if given["mode"] == "payment" else None,
        "livemode": livemode,
        "metadata": {},
        "payment_method_collection": "if_required",
        "payment_method_configuration_details": None,
        "payment_method_options": {},
        "payment_method_types": ["card", "sepa_debit"],
        "payment_status": "unpaid",
        "permissions": None,
        "phone_number_collection": {"enabled": False},
        "saved_payment_method_options": None,
        "shipping_options": [],
        "status": "open",
        "total_details": {"amount_discount": discount, "amount_shipping": 0, "amount_tax": 0},
        "ui_mode": "hosted_page",
        "url": url,
    } | given  # fmt: skip


def payment_intent(id: str, *, amount: int, currency: str, customer: str | None, created: int, livemode: bool,
                   description: str | None, metadata: Mapping[str, str], order: str | None) -> Json:  # fmt: skip
    """A payment that was begun.

    :param order: the invoice that it is for.
    """
    return _empty(
        "application application_fee_amount automatic_payment_methods canceled_at cancellation_reason customer_account"
        " excluded_payment_method_types last_payment_error latest_charge next_action on_behalf_of payment_method"
        " payment_method_configuration_details processing receipt_email review setup_future_usage shipping source"
        " statement_descriptor statement_descriptor_suffix transfer_data transfer_group"
    ) | {
        "id": id,
        "object": "payment_intent",
        "amount": amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "capture_method": "automatic",
        "client_secret": f"{id}_secret_fake",
        "confirmation_method": "automatic",
        "created": created,
        "currency": currency,
        "customer": customer,
        "description": description,
        "livemode": livemode,
        "metadata": dict(metadata),
        "payment_details": {"customer_reference": None, "order_reference": order},
        "payment_method_options": {},
        "payment_method_types": ["card", "sepa_debit"],
        "status": "requires_payment_method",
    }  # fmt: skip


def charge(id: str, intent: Json, *, status: str, created: int, transaction: str | None) -> Json:
    """One attempt to collect a payment.

    :param status: ``succeeded``, ``pending`` or ``failed``.
    """
    failed = status == "failed"
    return _empty(
        "application application_fee application_fee_amount destination dispute failure_balance_transaction"
        " on_behalf_of order receipt_email receipt_number review shipping source source_transfer statement_descriptor"
        " statement_descriptor_suffix transfer_data transfer_group"
    ) | {
        "id": id,
        "object": "charge",
        "amount": intent["amount"],
        "amount_captured": 0 if failed else intent["amount"],
        "amount_refunded": 0,
        "balance_transaction": transaction,
        "billing_details": _empty("address email name phone tax_id"),
        "calculated_statement_descriptor": "FAKE",
        "captured": not failed,
        "created": created,
        "currency": intent["currency"],
        "customer": intent["customer"],
        "description": intent["description"],
        "disputed": False,
        "failure_code": "card_declined" if failed else None,
        "failure_message": "Your card was declined." if failed else None,
        "fraud_details": {},
        "livemode": intent["livemode"],
        "metadata": dict(intent["metadata"]),
        "outcome": None,
        "paid": status == "succeeded",
        "payment_intent": intent["id"],
        "payment_method": None,
        "payment_method_details": {"type": "card", "card": {"brand": "visa", "last4": "4242"}},
        "radar_options": {},
        "receipt_url": None,
        "refunded": False,
        "status": status,
    }  # fmt: skip


def balance_transaction(id: str, *, amount: int, fee: int, currency: str, created: int, source: str,
                        type: str) -> Json:  # fmt: skip
    """A movement on the seller's balance: negative is away."""
    return {
        "id": id,
        "object": "balance_transaction",
        "amount": amount,
        "available_on": created,
        "balance_type": "payments",
        "created": created,
        "currency": currency,
        "description": None,
        "exchange_rate": None,
        "fee": fee,
        "fee_details": [],
        "net": amount - fee,
        "reporting_category": type,
        "source": source,
        "status": "available",
        "type": type,
    }


def refund(id: str, charged: Json, *, amount: int, status: str, created: int, transaction: str | None,
           metadata: Mapping[str, str], reason: str | None) -> Json:  # fmt: skip
    """Money on its way back to the customer, or there."""
    return {
        "id": id,
        "object": "refund",
        "amount": amount,
        "balance_transaction": transaction,
        "charge": charged["id"],
        "created": created,
        "currency": charged["currency"],
        "destination_details": {
            "card": {"reference_status": "pending", "reference_type": "acquirer_reference_number", "type": "refund"},
            "type": "card",
        },
        "metadata": dict(metadata),
        "payment_intent": charged["payment_intent"],
        "reason": reason,
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": status,
        "transfer_reversal": None,
    }


def dispute(id: str, charged: Json, *, amount: int, status: str, created: int, reason: str) -> Json:
    """What a customer's bank asks back."""
    return {
        "id": id,
        "object": "dispute",
        "amount": amount,
        "balance_transactions": [],
        "charge": charged["id"],
        "created": created,
        "currency": charged["currency"],
        "enhanced_eligibility_types": [],
        "evidence": {},
        "evidence_details": {"due_by": None, "has_evidence": False, "past_due": False, "submission_count": 0},
        "is_charge_refundable": status.startswith("warning"),
        "livemode": charged["livemode"],
        "metadata": {},
        "payment_intent": charged["payment_intent"],
        "reason": reason,
        "status": status,
    }


def subscription_item(id: str, subscribed: str, priced: Json, *, quantity: int, created: int, start: int,
                      end: int) -> Json:  # fmt: skip
    """What is subscribed to, with the period that it is in."""
    return {
        "id": id,
        "object": "subscription_item",
        "billing_thresholds": None,
        "created": created,
        "current_period_end": end,
        "current_period_start": start,
        "discounts": [],
        "metadata": {},
        "plan": _plan(priced),
        "price": priced,
        "quantity": quantity,
        "subscription": subscribed,
        "tax_rates": [],
    }


def repriced(item: Json, priced: Json, quantity: int) -> None:
    """Put another price into an item of a subscription."""
    item.update(price=priced, plan=_plan(priced), quantity=quantity)


def subscription(id: str, *, customer: str, currency: str, created: int, livemode: bool, anchor: int, status: str,
                 metadata: Mapping[str, str], trial_end: int | None) -> Json:  # fmt: skip
    """A subscription; its items stand apart."""
    return _empty(
        "application application_fee_percent billing_cycle_anchor_config billing_thresholds cancel_at canceled_at"
        " customer_account days_until_due default_payment_method default_source description ended_at latest_invoice"
        " next_pending_invoice_item_invoice on_behalf_of pause_collection pending_invoice_item_interval"
        " pending_setup_intent pending_update schedule test_clock transfer_data"
    ) | {
        "id": id,
        "object": "subscription",
        "automatic_tax": {"disabled_reason": None, "enabled": False, "liability": None},
        "billing_cycle_anchor": anchor,
        "billing_mode": {
            "flexible": {"proration_discounts": "included"}, "type": "flexible", "updated_at": created,
        },
        "cancel_at_period_end": False,
        "cancellation_details": _empty("comment feedback reason"),
        "collection_method": "charge_automatically",
        "created": created,
        "currency": currency,
        "customer": customer,
        "default_tax_rates": [],
        "discounts": [],
        "invoice_settings": {"account_tax_ids": None, "issuer": {"type": "self"}},
        "livemode": livemode,
        "metadata": dict(metadata),
        "payment_settings": _empty("payment_method_options payment_method_types")
        | {"save_default_payment_method": "off"},
        "start_date": created,
        "status": status,
        "trial_end": trial_end,
        "trial_settings": {"end_behavior": {"missing_payment_method": "create_invoice"}},
        "trial_start": None if trial_end is None else created,
    }  # fmt: skip


def invoice_line(id: str, invoice: str, priced: Json, *, amount: int, quantity: int, start: int, end: int,
                 description: str, livemode: bool, subscription: str | None = None, item: str | None = None,
                 invoice_item: str | None = None, proration: bool = False, credited: Json | None = None,
                 discount: int = 0) -> Json:  # fmt: skip
    """A line of an invoice: of a subscription's item where ``item`` is given, else of something sold once.

    :param credited: which lines a negative one gives back.
    :param discount: what the invoice takes off for it; ``amount`` is without.
    """
    details = {
        "invoice_item": invoice_item,
        "proration": proration,
        "proration_details": {"credited_items": credited},
        "subscription": subscription,
    }
    kind = "invoice_item_details" if item is None else "subscription_item_details"
    parent = {"invoice_item_details": None, "subscription_item_details": None, "type": kind}
    return {
        "id": id,
        "object": "line_item",
        "amount": amount,
        "currency": priced["currency"],
        "description": description,
        "discount_amounts": [{"amount": discount, "discount": "di_fake"}] if discount else [],
        "discountable": not proration,
        "discounts": [],
        "invoice": invoice,
        "livemode": livemode,
        "metadata": {},
        "parent": parent | {kind: details if item is None else details | {"subscription_item": item}},
        "period": {"end": end, "start": start},
        "pretax_credit_amounts": [],
        "pricing": {
            "price_details": {"price": priced["id"], "product": priced["product"]},
            "type": "price_details",
            "unit_amount_decimal": None if proration else str(amount // quantity if quantity else 0),
        },
        "quantity": quantity,
        "quantity_decimal": str(quantity),
        "subtotal": amount,
        "taxes": [],
    }


def invoice(id: str, *, customer: Json | None, currency: str, created: int, livemode: bool, reason: str, number: str,
            subtotal: int, discount: int, starting_balance: int, period: tuple[int, int],
            subscription: Json | None, metadata: Mapping[str, str]) -> Json:  # fmt: skip
    """An invoice that is a draft; its lines stand apart.

    :param period: of the invoice, which is not that of its lines.
    """
    total = subtotal - discount
    due = max(0, total + starting_balance)
    about = {"metadata": dict(subscription["metadata"]), "subscription": subscription["id"]} if subscription else None
    return _empty(
        "account_tax_ids application automatically_finalizes_at custom_fields customer_account customer_address"
        " customer_phone customer_shipping default_payment_method default_source description due_date effective_at"
        " footer from_invoice hosted_invoice_url invoice_pdf last_finalization_error latest_revision"
        " next_payment_attempt on_behalf_of receipt_number rendering shipping_cost shipping_details"
        " statement_descriptor test_clock webhooks_delivered_at"
    ) | {
        "id": id,
        "object": "invoice",
        "account_country": "FR",
        "account_name": "Fake",
        "amount_due": due,
        "amount_overpaid": 0,
        "amount_paid": 0,
        "amount_remaining": due,
        "amount_shipping": 0,
        "attempt_count": 0,
        "attempted": False,
        "auto_advance": True,
        "automatic_tax": {"enabled": False} | _empty("disabled_reason liability provider status"),
        "billing_reason": reason,
        "collection_method": "charge_automatically",
        "created": created,
        "currency": currency,
        "customer": customer and customer["id"],
        "customer_email": customer and customer["email"],
        "customer_name": customer and customer["name"],
        "customer_tax_exempt": "none",
        "customer_tax_ids": [],
        "default_tax_rates": [],
        "discounts": [],
        "ending_balance": None,
        "issuer": {"type": "self"},
        "livemode": livemode,
        "metadata": dict(metadata),
        "number": number,
        "parent": about and {"quote_details": None, "subscription_details": about, "type": "subscription_details"},
        "payment_settings": _empty("default_mandate payment_method_options payment_method_types"),
        "period_end": period[1],
        "period_start": period[0],
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "starting_balance": starting_balance,
        "status": "draft",
        "status_transitions": _empty("finalized_at marked_uncollectible_at paid_at voided_at"),
        "subtotal": subtotal,
        "subtotal_excluding_tax": subtotal,
        "total": total,
        "total_discount_amounts": [{"amount": discount, "discount": "di_fake"}] if discount else [],
        "total_excluding_tax": total,
        "total_pretax_credit_amounts": [],
        "total_taxes": [],
    }  # fmt: skip


def invoice_payment(id: str, invoiced: Json, intent: str, created: int) -> Json:
    """Which payment an invoice is to be paid by."""
    return {
        "id": id,
        "object": "invoice_payment",
        "amount_paid": None,
        "amount_requested": invoiced["amount_due"],
        "created": created,
        "currency": invoiced["currency"],
        "invoice": invoiced["id"],
        "is_default": True,
        "livemode": invoiced["livemode"],
        "payment": {"payment_intent": intent, "type": "payment_intent"},
        "status": "open",
        "status_transitions": {"canceled_at": None, "paid_at": None},
    }


def event(id: str, type: str, object: Json, previous: Json | None, *, created: int, livemode: bool) -> Json:
    """A snapshot event.

    :param object: as it was at that time.
    :param previous: what changed fields were before.
    """
    return {
        "id": id,
        "object": "event",
        "api_version": API_VERSION,
        "created": created,
        "data": {"object": object} | ({} if previous is None else {"previous_attributes": previous}),
        "livemode": livemode,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": type,
    }
