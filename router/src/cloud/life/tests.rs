use super::*;
use proptest::prelude::*;

const PATIENCE: Patience = Patience {
    drain: Duration::from_secs(300),
    stop: Duration::from_secs(10),
};

/// Does all that is to be done, well, and tells what it was.
fn run(life: &mut Life, now: Instant) -> Vec<Action> {
    let mut done = Vec::new();
    while let Some(action) = life.poll_action(now) {
        life.handle_done(action, true, now);
        done.push(action);
    }
    done
}

fn serving(grouped: bool, now: Instant) -> Life {
    let mut life = Life::new(PATIENCE);
    if grouped {
        life.handle(Seen::Target(Target::InService), now);
    }
    life.handle(Seen::Ready, now);
    run(&mut life, now);
    assert_eq!(life.phase(), Phase::Serving);
    life
}

#[test]
fn a_router_of_a_group_is_born_and_goes_in_order() {
    let now = Instant::now();
    let mut life = Life::new(PATIENCE);
    assert_eq!(run(&mut life, now), []);
    life.handle(Seen::Target(Target::InService), now);
    assert_eq!(run(&mut life, now), []);
    life.handle(Seen::Ready, now);
    assert_eq!(run(&mut life, now), [Action::CompleteLaunch]);
    life.handle(Seen::Ready, now);
    life.handle(Seen::Target(Target::InService), now);
    assert_eq!(run(&mut life, now), []);

    life.handle(Seen::Target(Target::Terminated), now);
    assert!(!life.serves());
    assert_eq!(run(&mut life, now), [Action::Heartbeat, Action::Withdraw]);
    life.handle(Seen::Flows(3), now);
    assert!(matches!(
        life.phase(),
        Phase::Draining {
            cause: Cause::Group,
            ..
        }
    ));
    let later = now + HEARTBEAT;
    assert_eq!(life.poll_timeout(), Some(later));
    life.handle_timeout(later);
    // It is asked each five seconds, and says the same each time.
    life.handle(Seen::Target(Target::Terminated), later);
    assert_eq!(run(&mut life, later), [Action::Heartbeat]);
    life.handle(Seen::Flows(0), later);
    let end = [
        Action::Leave,
        Action::DropRoutes,
        Action::CompleteTermination,
    ];
    assert_eq!(run(&mut life, later), end);
    assert_eq!(life.phase(), Phase::Left);
    assert_eq!(life.poll_timeout(), None);
}

#[test]
fn flows_that_do_not_end_are_waited_for_until_the_time_is_up() {
    let now = Instant::now();
    let mut life = serving(false, now);
    life.handle(Seen::Signal, now);
    run(&mut life, now);
    life.handle(Seen::Flows(1), now);
    let until = now + PATIENCE.stop;
    assert_eq!(life.poll_timeout(), Some(until));
    life.handle_timeout(until);
    assert_eq!(run(&mut life, until), [Action::Leave, Action::DropRoutes]);
    assert_eq!(life.phase(), Phase::Left);
}

#[test]
fn no_flows_mean_nothing_before_new_ones_are_refused() {
    let now = Instant::now();
    let mut life = serving(false, now);
    life.handle(Seen::Drain(None), now);
    life.handle(Seen::Flows(0), now);
    assert!(matches!(life.phase(), Phase::Draining { .. }));
    run(&mut life, now);
    life.handle(Seen::Flows(0), now);
    assert_eq!(life.phase(), Phase::Drained);
    assert_eq!(run(&mut life, now), [Action::DropRoutes]);
}

#[test]
fn who_serves_again_gives_no_route_up() {
    let now = Instant::now();
    let mut life = serving(false, now);
    life.handle(Seen::Drain(None), now);
    run(&mut life, now);
    life.handle(Seen::Flows(0), now);
    assert_eq!(life.poll_action(now), Some(Action::DropRoutes));
    life.handle(Seen::Undrain, now);
    life.handle_done(Action::DropRoutes, false, now);
    assert_eq!(run(&mut life, now), [Action::Advertise]);
}

#[test]
fn what_somebody_drains_by_hand_comes_back_by_hand() {
    let now = Instant::now();
    let mut life = serving(true, now);
    life.handle(Seen::Undrain, now);
    assert_eq!(run(&mut life, now), []);
    life.handle(Seen::Drain(None), now);
    assert_eq!(run(&mut life, now), [Action::Withdraw]);
    life.handle(Seen::Undrain, now);
    assert_eq!(life.phase(), Phase::Serving);
    assert_eq!(run(&mut life, now), [Action::Advertise]);
    life.handle(Seen::Drain(None), now);
    life.handle(Seen::Target(Target::Terminated), now);
    life.handle(Seen::Undrain, now);
    assert!(!life.serves(), "what the group takes out stays out");
}

#[test]
fn a_graver_cause_shortens_the_time_and_never_lengthens_it() {
    let now = Instant::now();
    let mut life = serving(true, now);
    life.handle(Seen::Drain(None), now);
    life.handle(Seen::Spot, now);
    let until = |life: &Life| match life.phase() {
        Phase::Draining { cause, until } => (cause, until),
        other => panic!("{other:?}"),
    };
    assert_eq!(until(&life), (Cause::Spot, now + SPOT));
    let later = now + Duration::from_secs(60);
    life.handle(Seen::Target(Target::Terminated), later);
    assert_eq!(until(&life), (Cause::Spot, now + SPOT));
    run(&mut life, later);
    life.handle(Seen::Flows(0), later);
    let end = [
        Action::Leave,
        Action::DropRoutes,
        Action::CompleteTermination,
    ];
    assert_eq!(run(&mut life, later), end);
}

#[test]
fn what_fails_is_tried_again_in_its_place() {
    let now = Instant::now();
    let mut life = serving(true, now);
    life.handle(Seen::Target(Target::Terminated), now);
    run(&mut life, now);
    life.handle(Seen::Flows(0), now);
    assert_eq!(life.poll_action(now), Some(Action::Leave));
    assert_eq!(life.poll_action(now), None);
    life.handle_done(Action::Leave, false, now);
    assert_eq!(life.poll_action(now), None);
    let again = now + RETRY;
    assert_eq!(life.poll_timeout(), Some(again));
    let end = [
        Action::Leave,
        Action::DropRoutes,
        Action::CompleteTermination,
    ];
    assert_eq!(run(&mut life, again), end);
}

#[test]
fn the_group_hears_of_the_launch_though_it_is_known_late() {
    let now = Instant::now();
    let mut life = serving(false, now);
    life.handle(Seen::Drain(None), now);
    life.handle(Seen::Target(Target::InService), now);
    assert_eq!(run(&mut life, now), [Action::Withdraw]);
    life.handle(Seen::Undrain, now);
    let back = [Action::Advertise, Action::CompleteLaunch];
    assert_eq!(run(&mut life, now), back);
}

#[test]
fn the_group_hears_of_the_launch_though_a_drain_comes_between() {
    let now = Instant::now();
    let mut life = Life::new(PATIENCE);
    life.handle(Seen::Target(Target::InService), now);
    life.handle(Seen::Ready, now);
    assert_eq!(life.poll_action(now), Some(Action::CompleteLaunch));
    // It is asked each five seconds what the group wants.
    life.handle(Seen::Target(Target::InService), now);
    life.handle_done(Action::CompleteLaunch, false, now);
    assert_eq!(run(&mut life, now), []);
    life.handle(Seen::Drain(None), now);
    assert_eq!(run(&mut life, now), [Action::Withdraw]);
    life.handle(Seen::Undrain, now);
    let back = [Action::Advertise, Action::CompleteLaunch];
    assert_eq!(run(&mut life, now), back);
    life.handle(Seen::Drain(None), now);
    life.handle(Seen::Undrain, now);
    assert_eq!(run(&mut life, now), [Action::Advertise]);
}

#[test]
fn without_patience_a_signal_ends_it_at_once() {
    let now = Instant::now();
    let patience = Patience {
        stop: Duration::ZERO,
        ..PATIENCE
    };
    let mut life = Life::new(patience);
    life.handle(Seen::Ready, now);
    life.handle(Seen::Signal, now);
    assert_eq!(run(&mut life, now), [Action::Leave, Action::DropRoutes]);
    assert_eq!(life.phase(), Phase::Left);

    // Also while it waits for somebody else.
    let mut life = Life::new(patience);
    life.handle(Seen::Ready, now);
    life.handle(Seen::Drain(None), now);
    assert_eq!(run(&mut life, now), [Action::Withdraw]);
    life.handle(Seen::Signal, now);
    assert_eq!(life.poll_timeout(), Some(now));
    life.handle_timeout(now);
    assert_eq!(run(&mut life, now), [Action::Leave, Action::DropRoutes]);
}

#[test]
fn who_drains_by_hand_says_how_long() {
    let now = Instant::now();
    let mut life = serving(false, now);
    let until = |life: &Life| match life.phase() {
        Phase::Draining { until, .. } => until - now,
        other => panic!("{other:?}"),
    };
    let minute = Duration::from_secs(60);
    life.handle(Seen::Drain(Some(minute)), now);
    assert_eq!(until(&life), minute);
    life.handle(Seen::Drain(None), now);
    assert_eq!(until(&life), minute);
    life.handle(Seen::Drain(Some(2 * minute)), now);
    assert_eq!(until(&life), 2 * minute);
    // A graver cause is not put off.
    life.handle(Seen::Target(Target::Terminated), now);
    life.handle(Seen::Drain(Some(9 * minute)), now);
    assert_eq!(until(&life), 2 * minute);
    assert_eq!(life.cause(), Some(Cause::Group));
}

#[test]
fn what_cannot_be_withdrawn_holds_up_neither_leaving_nor_coming_back() {
    let now = Instant::now();
    for leaves in [true, false] {
        let mut life = serving(false, now);
        life.handle(Seen::Drain(None), now);
        assert_eq!(life.poll_action(now), Some(Action::Withdraw));
        let then = match leaves {
            true => {
                life.handle(Seen::Signal, now);
                let until = now + PATIENCE.stop;
                life.handle_timeout(until);
                life.handle_done(Action::Withdraw, false, until);
                vec![Action::Leave, Action::DropRoutes]
            }
            false => {
                life.handle(Seen::Undrain, now);
                life.handle_done(Action::Withdraw, false, now);
                vec![Action::Advertise]
            }
        };
        assert_eq!(run(&mut life, now), then);
    }
}

#[test]
fn who_cannot_be_told_holds_nothing_up() {
    let mut now = Instant::now();
    let mut life = serving(true, now);
    life.handle(Seen::Target(Target::Terminated), now);
    run(&mut life, now);
    life.handle(Seen::Flows(0), now);
    let mut failed = 0;
    while let Some(at) = life
        .poll_timeout()
        .or(Some(now))
        .filter(|_| life.phase() != Phase::Left)
    {
        now = now.max(at);
        while let Some(action) = life.poll_action(now) {
            failed += u32::from(action == Action::Leave);
            life.handle_done(action, action != Action::Leave, now);
        }
    }
    assert_eq!(failed, TRIES);
}

fn seen() -> impl Strategy<Value = Seen> {
    prop_oneof![
        Just(Seen::Ready),
        Just(Seen::Target(Target::InService)),
        Just(Seen::Target(Target::Terminated)),
        Just(Seen::Spot),
        Just(Seen::Drain(None)),
        Just(Seen::Drain(Some(Duration::from_secs(7)))),
        Just(Seen::Undrain),
        Just(Seen::Signal),
        (0..3_u64).prop_map(Seen::Flows),
    ]
}

proptest! {
    /// Whatever is seen, in whatever order, with whatever failures: routes go before the node does, the group is told
    /// last, nothing is advertised on the way out, and a router that must leave has left in the end.
    #[test]
    fn the_order_holds(script in prop::collection::vec((seen(), 0..90_u64, any::<bool>()), 0..60)) {
        let start = Instant::now();
        let mut now = start;
        let mut life = Life::new(PATIENCE);
        let mut done = Vec::new();
        let mut step = |life: &mut Life, now: Instant, well: bool| {
            life.handle_timeout(now);
            // Each is done at most a few times: what fails waits.
            while let Some(action) = life.poll_action(now) {
                life.handle_done(action, well, now);
                done.push(action);
            }
        };
        let mut must_leave = false;
        for (seen, seconds, well) in script {
            must_leave |= matches!(seen, Seen::Signal | Seen::Spot | Seen::Target(Target::Terminated));
            life.handle(seen, now);
            step(&mut life, now, well);
            now += Duration::from_secs(seconds);
        }
        for _ in 0..20 {
            now += Duration::from_secs(60);
            life.handle(Seen::Flows(1), now);
            step(&mut life, now, true);
        }
        if must_leave {
            prop_assert_eq!(life.phase(), Phase::Left);
            let place = |wanted| done.iter().rposition(|action| *action == wanted);
            prop_assert!(place(Action::Withdraw) < place(Action::Leave));
            prop_assert!(place(Action::Leave) < place(Action::DropRoutes));
            if let Some(told) = place(Action::CompleteTermination) {
                prop_assert!(place(Action::DropRoutes) < Some(told));
            }
            prop_assert!(place(Action::Advertise) < place(Action::Withdraw));
        }
    }
}
