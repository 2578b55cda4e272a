use super::*;
use crate::cloud::life::Target;

const PATIENCE: Patience = Patience {
    drain: Duration::from_secs(300),
    stop: Duration::from_secs(20),
};

fn serving(patience: Patience) -> Course {
    let mut course = Course::new(patience, None);
    course.see(Seen::Ready);
    course
}

/// Does all that is to be done, well, and tells what it was.
fn run(course: &mut Course) -> Vec<Action> {
    let mut done = Vec::new();
    while let Some(action) = course.next_action() {
        match action {
            Action::Withdraw => course.withdrawn = true,
            Action::Advertise => course.withdrawn = false,
            _ => {}
        }
        course.done(action, true);
        done.push(action);
    }
    done
}

fn counted(course: &mut Course, flows: u64) {
    course.take_count(Ok(flows), Instant::now());
}

#[test]
fn what_the_group_asks_for_is_done_and_shown() {
    let mut course = serving(PATIENCE);
    course.see(Seen::Target(Target::Terminated));
    assert_eq!(course.next_action(), Some(Action::Heartbeat));
    // Until the group has heard it, nothing else is done.
    assert_eq!(course.next_action(), None);
    let status = course.status();
    assert_eq!((status.phase, status.cause), ("draining", Some("group")));
    let waits_for = status.waits_for.unwrap();
    assert!(waits_for.contains("still drains"), "{waits_for}");
    course.done(Action::Heartbeat, true);
    assert_eq!(run(&mut course), [Action::Withdraw]);
    assert_eq!(course.status().waits_for, Some("flows to end"));
    counted(&mut course, 2);
    assert_eq!(course.status().flows, Some(2));
    counted(&mut course, 0);
    assert_eq!(course.status().phase, "leaving");
    let end = [
        Action::Leave,
        Action::DropRoutes,
        Action::CompleteTermination,
    ];
    assert_eq!(run(&mut course), end);
    let status = course.status();
    assert_eq!((status.phase, status.waits_for), ("left", None));
    // The instance is the group's to end, not ours.
    assert_eq!(course.ends, None);
    let refused = course.undrain().unwrap_err();
    assert!(refused.contains("its group takes"), "{refused}");
}

#[test]
fn an_agent_that_is_gone_holds_nothing_up() {
    let mut course = serving(PATIENCE);
    course.see(Seen::Target(Target::Terminated));
    assert_eq!(course.next_action(), Some(Action::Heartbeat));
    course.give_up();
    assert_eq!(run(&mut course), [Action::Withdraw]);
}

#[test]
fn without_patience_a_signal_leads_out_at_once() {
    let mut course = serving(Patience {
        stop: Duration::ZERO,
        ..PATIENCE
    });
    course.tell_to_stop("SIGTERM");
    assert_eq!(run(&mut course), [Action::Leave, Action::DropRoutes]);
    assert_eq!(course.life.phase(), Phase::Left);
}

#[test]
fn a_second_signal_ends_the_wait() {
    let mut course = serving(PATIENCE);
    course.tell_to_stop("SIGTERM");
    assert_eq!(run(&mut course), [Action::Withdraw]);
    counted(&mut course, 1);
    let longest = Instant::now() + PATIENCE.stop + GRACE;
    assert!(course.ends.is_some_and(|ends| ends <= longest));
    assert!(course.due().is_some_and(|due| due > Instant::now()));
    course.tell_to_stop("SIGINT");
    assert!(course.ends.is_some_and(|ends| ends <= Instant::now()));
}

#[test]
fn flows_are_counted_often_while_they_are_waited_for() {
    let mut course = serving(PATIENCE);
    course.drain(Some(Duration::from_secs(60))).unwrap();
    let unready = course.unready().unwrap();
    assert!(unready.contains("somebody has asked"), "{unready}");
    assert_eq!(run(&mut course), [Action::Withdraw]);
    let before = Instant::now();
    course.take_count(Ok(3), before);
    let status = course.status();
    assert_eq!((status.phase, status.flows), ("draining", Some(3)));
    assert!(status.until.is_some());
    let next = course.count.due.unwrap();
    assert!(next >= before + OFTEN && next < before + SELDOM, "{next:?}");
    // A count that takes long is not made often.
    let (took, now) = (Duration::from_secs(2), Instant::now());
    course.take_count(Ok(3), now.checked_sub(took).unwrap());
    assert!(course.count.due.unwrap() >= now + PAUSES * took);
    // One that fails is a problem until the next.
    course.take_count(Err("no rights".to_owned()), now);
    let problem = course.problem().unwrap();
    assert!(problem.contains("no rights"), "{problem}");
    counted(&mut course, 0);
    assert_eq!(course.problem(), None);
    assert_eq!(course.status().phase, "drained");
    assert!(course.count.due.unwrap() >= now + SELDOM);
    course.undrain().unwrap();
    assert_eq!(run(&mut course), [Action::Advertise]);
    assert_eq!((course.unready(), course.status().flows), (None, None));
}

#[test]
fn a_daemon_after_one_that_was_drained_takes_nothing_new() {
    let mut course = Course::new(PATIENCE, Some(Duration::from_secs(60)));
    assert!(course.has_withdrawn());
    let unready = course.unready().unwrap();
    assert!(unready.contains("somebody has asked"), "{unready}");
    assert_eq!(run(&mut course), [Action::Withdraw]);
    course.see(Seen::Ready);
    assert_eq!(course.status().phase, "draining");
    // With no time left it has drained, and still takes nothing new.
    let mut course = Course::new(PATIENCE, Some(Duration::ZERO));
    course.life.handle_timeout(Instant::now());
    assert_eq!(course.status().phase, "drained");
    assert_eq!(run(&mut course), [Action::Withdraw, Action::DropRoutes]);
    course.undrain().unwrap();
    assert_eq!(run(&mut course), [Action::Advertise]);
}
